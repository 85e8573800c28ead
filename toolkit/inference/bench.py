"""`toolkit bench-inference`: the plain model and each memory saving, one after the other on the same text.

Bytes of weights and of keys and values are those of each rank; peak memory is what the system
counts for its process (on a GPU: what PyTorch's allocator has given out). Perplexity is over
windows of the text, each token predicted from those before it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.errors import ConfigError, DataError, ToolkitError
from toolkit.inference.bottleneck import analyse, rank_line
from toolkit.inference.memory import forget_peak, fragmented, free, peak
from toolkit.inference.request import Request, Sampling
from toolkit.inference.run import Session
from toolkit.model.init import named_weights
from toolkit.model.messages import Kind
from toolkit.model.savings import weight_bytes

WINDOW = 256
KINDS: tuple[Kind, ...] = ("tensor", "pipeline", "waiting")
DECODED = 16
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"kv": "int8"},
    {"grow": True},
    {"prune": "0.5"},
    {"prune": "2:4"},
    {"weights": "int8"},
    {"weights": "int4"},
    {"weights": "int8", "kv": "int8"},
    {"offload": "disk"},
)
ON_A_GPU: tuple[dict[str, Any], ...] = ({"kv": "cpu"}, {"offload": "cpu"})


@dataclass(frozen=True)
class Measured:
    """One variant. Bytes: the largest of all ranks; saved: against the plain model's, in percent;
    agreement: share of places whose most probable token is the plain model's; first_token_ms: of a
    prompt of 8 tokens. refused: why it could not be measured here.
    """

    name: str
    weights: int = 0
    cache: int = 0
    peak: int = 0
    memory_saved: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    time_saved: float = 0.0
    first_token_ms: float = 0.0
    token_ms: float = 0.0
    perplexity: float = math.nan
    agreement: float = math.nan
    refused: str = ""


def run(request: Request, *, out: TextIO | None = None) -> None:
    """Measure all variants and show them on rank 0."""
    found = measure(request)
    if found is None:
        return
    out = out or sys.stdout
    if request.as_json:
        out.write(json.dumps(found, indent=1) + "\n")
    else:
        out.write(
            "\n".join(table(found["variants"])) + "\n\n" + "\n".join([*map(rank_line, found["ranks"]), "", *found["analysis"]]) + "\n"
        )
    out.flush()


def measure(request: Request) -> dict[str, Any] | None:
    """Every variant, where each rank's memory and time are in the plain model, and what that means;
    on rank 0, None elsewhere. All ranks call it.
    """
    session = Session(request)
    if session.layout.dp > 1:
        raise ConfigError(f"{session.layout.dp} copies of the model", why="one is measured", fix="Start tp x pp processes.")
    windows = _windows(session, request)
    plain: Tensor | None = None
    found: list[Measured] = []
    ranks: list[dict[str, Any]] = []
    variants = VARIANTS + (ON_A_GPU if session.world.device.type == "cuda" else ())
    for number, variant in enumerate(variants):
        asked = replace(request, **variant)
        if number:
            del session.stage
        try:
            session.load(asked)
        except ToolkitError as error:  # raised on all ranks alike
            found.append(Measured(_name(variant), refused=str(error)))
            session.load(request)
            continue
        one, best = _one(session, windows, _name(variant), plain)
        plain = best if number == 0 else plain
        first = found[0] if found else one
        found.append(
            replace(
                one,
                memory_saved=100 * (1 - (one.weights + one.cache) / (first.weights + first.cache)),
                time_saved=100 * (1 - first.decode / one.decode),
            )
        )
        if number == 0:
            ranks = _ranks(session, one)
    memory = session.memory()
    session.close()
    if session.world.rank != 0:
        return None
    listed = [asdict(m) for m in found]
    return {
        "model": str(session.model.path),
        "layout": {"processes": session.world.size, "tp": session.layout.tp, "pp": session.layout.pp},
        "dtype": session.config.train.precision,
        "device": "cpu" if session.world.device.type == "cpu" else torch.cuda.get_device_name(),
        "variants": listed,
        "ranks": ranks,
        "analysis": analyse(ranks, listed, model=memory["model"]),
    }


def _name(variant: dict[str, Any]) -> str:
    from toolkit.model.savings import Savings

    return Savings(**variant).name


def _one(session: Session, windows: Tensor, name: str, plain: Tensor | None) -> tuple[Measured, Tensor]:
    stage = session.stage
    forget_peak()
    started = time.perf_counter()
    total, best, cache_bytes = 0.0, [], 0
    with torch.no_grad():
        for window in windows:
            cache = stage.cache(batch=1, length=len(window) + DECODED)
            logits = stage.forward(window[None, :-1], cache, everywhere=True)
            cache_bytes = max(cache_bytes, cache.nbytes)
            if logits is not None:
                total += float(torch.nn.functional.cross_entropy(logits[0], window[1:], reduction="sum"))
                best.append(logits[0].argmax(dim=-1))
    places = windows.shape[0] * (windows.shape[1] - 1)
    chosen = torch.cat(best) if best else torch.zeros(places, dtype=torch.int64, device=stage.device)
    sums = torch.tensor([total, float((chosen == plain).sum()) if plain is not None else places], dtype=torch.float64, device=stage.device)
    stage.share(sums)
    prefill = places / (time.perf_counter() - started)
    stop, session.text.stop = session.text.stop, frozenset()
    session.request = replace(session.request, max_new_tokens=DECODED, sampling=Sampling())
    before = time.perf_counter()
    session.generate([windows[0, :8].tolist()])
    times = session.times
    session.text.stop = stop
    decode = times.decoded / times.decode if times.decode else (time.perf_counter() - before)
    sizes = _largest([session.memory()["held"], cache_bytes, peak(stage.device)], device=stage.device)
    return (
        Measured(
            name=name,
            weights=sizes[0],
            cache=sizes[1],
            peak=sizes[2],
            prefill=prefill,
            decode=decode,
            first_token_ms=1e3 * times.prefill,
            token_ms=1e3 / decode,
            perplexity=math.exp(min(700.0, float(sums[0]) / places)),
            agreement=float(sums[1]) / places,
        ),
        chosen,
    )


def _windows(session: Session, request: Request) -> Tensor:
    """Held-out text as ids [windows, tokens of one]."""
    if request.bench:
        path = Path(request.bench)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(f"--data {path} cannot be read", why=str(e), fix="Name a text file in UTF-8.") from None
    else:
        from pydoc_data import topics

        text = "\n\n".join(topics.topics.values())
    length = min(WINDOW, session.config.model.max_position_embeddings - DECODED)
    wanted = max(1, request.max_new_tokens // length)
    ids = session.text.encode(text[: 16 * wanted * length], name="the held-out text")
    count = min(wanted, len(ids) // length)
    if count == 0:
        raise DataError(f"the held-out text has {len(ids)} tokens", why=f"a window takes {length}", fix="Name a longer one with --data.")
    return torch.tensor(ids[: count * length], device=session.stage.device).view(count, length)


def _largest(values: list[int], *, device: torch.device) -> list[int]:
    found = torch.tensor(values, dtype=torch.int64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [int(v) for v in found.tolist()]


def _ranks(session: Session, one: Measured) -> list[dict[str, Any]]:
    """Where each rank's memory and a token's time are, and what several ranks hold alike."""
    stage, layout = session.stage, session.layout
    twice = 0
    spec = session.config.model.spec
    for weight, parameter in named_weights(stage.model, spec):
        whole_on_all = weight.cut.dim is None and layout.tp > 1 and stage.at.tp > 0
        second_end = layout.pp > 1 and stage.last and weight.name == spec.before[0].name and spec.tied
        twice += parameter.nbytes if whole_on_all or second_end else 0
    with stage.messages.measured() as seconds:
        session.generate([list(range(8))])
    times = session.times
    passes, total = 1 + times.decoded, times.prefill + times.decode
    token: dict[str, float] = {kind: 1e3 * seconds.get(kind, 0.0) / passes for kind in KINDS}
    cache = stage.cache(batch=1, length=8 + DECODED)
    with torch.no_grad():
        stage.forward(torch.zeros((1, 8), dtype=torch.int64, device=stage.device), cache)
    mine = {
        "rank": session.world.rank,
        "stage": stage.at.pp,
        "weights": weight_bytes(stage.model),
        "held_by_others_too": twice,
        "kv": cache.nbytes,
        "kv_unused": round(cache.nbytes * DECODED / (8 + DECODED)),
        "fragmented": fragmented(stage.device),
        "read": session.read_bytes,
        "peak": peak(stage.device),
        "free": free(stage.device),
        "token_ms": {"compute": 1e3 * total / passes - sum(token.values()), **token},
    }
    if session.world.size == 1:
        return [mine]
    everyone: list[dict[str, Any]] = [{} for _ in range(session.world.size)]
    dist.all_gather_object(everyone, mine)
    return everyone


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """As Markdown."""
    lines = [
        "| | weights MB | KV MB | memory saved | peak MB | prefill tok/s | decode tok/s | time saved | perplexity | agreement |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for m in found:
        if m["refused"]:
            lines.append(f"| {m['name']} | refused: {m['refused']} | | | | | | | | |")
            continue
        lines.append(
            f"| {m['name']} | {m['weights'] / 1e6:.1f} | {m['cache'] / 1e6:.2f} | {m['memory_saved']:.0f} % | {m['peak'] / 1e6:.0f} "
            f"| {m['prefill']:.0f} | {m['decode']:.1f} | {m['time_saved']:.0f} % | {m['perplexity']:.3f} | {100 * m['agreement']:.1f} % |"
        )
    return lines
