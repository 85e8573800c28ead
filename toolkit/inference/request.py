"""What is asked of a generation, as plain values that the command hands to every rank. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. temperature 0: the most probable one; top_k 0 and top_p 1 leave
    all tokens in.

    A draw depends on seed, the prompt's number and the token's place alone, so that every layout
    draws the same.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @classmethod
    def of(cls, *, greedy: bool, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None) -> Sampling:
        """From the command's options; ConfigError for values that make no sense together."""
        given = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--seed": seed}
        named = [name for name, value in given.items() if value is not None]
        if temperature is not None and not 0.0 < temperature < float("inf"):
            raise ConfigError(f"--temperature {temperature:g}", why="it divides the logits", fix="Set it above 0, or use --greedy.")
        if top_k is not None and top_k < 1:
            raise ConfigError(f"--top-k {top_k} leaves no token", fix="Set it to 1 or more, or leave it out.")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ConfigError(f"--top-p {top_p:g} is no share", fix="Set it above 0 and to at most 1.")
        if seed is not None and not 0 <= seed < 2**63:
            raise ConfigError(f"--seed {seed}", why="a seed is a whole number from 0 to 2^63 - 1", fix="Set another one.")
        if greedy and named:
            raise ConfigError(f"--greedy beside {named[0]}", why="a greedy choice draws nothing", fix="Leave one of the two out.")
        if not named or greedy:
            return cls()
        if named == ["--seed"]:
            raise ConfigError("--seed alone", why="a greedy choice draws nothing", fix="Set --temperature too, for example to 1.")
        temperature = 1.0 if temperature is None else temperature
        return cls(temperature=temperature, top_k=top_k or 0, top_p=1.0 if top_p is None else top_p, seed=1234 if seed is None else seed)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One command. overrides: parallel.* of the command line; prompts: texts, or with chat users'
    messages; batch: prompts of one data-parallel rank that are computed at once; dtype: None as the
    weights are stored; weights, kv, grow, prune, offload: as toolkit.model.savings.Savings;
    layers_per_stage: how pipeline stages share the layers, as the option; rebalance: move that cut
    between prompts when devices have changed; memory_limit: GiB that a rank may take beside its
    libraries; auto: why --auto chose what the other values say; bench: measure savings on this
    text, "" for the usual one, None to generate;
    socket: of the conversation that a resident rank serves.
    """

    model: str
    prompts: list[str]
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    overrides: list[str] = field(default_factory=list)
    dtype: str | None = None
    tokenizer: str | None = None
    chat: bool = False
    batch: int = 8
    as_json: bool = False
    weights: str = "none"
    kv: str = "none"
    grow: bool = False
    prune: str = "none"
    offload: str = "none"
    layers_per_stage: str = "even"
    rebalance: bool = False
    nvme_path: str | None = None
    memory_limit: float | None = None
    auto: list[str] = field(default_factory=list)
    bench: str | None = None
    socket: str | None = None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Request:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**raw, "sampling": Sampling(**raw["sampling"])})
