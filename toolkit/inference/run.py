"""One rank of a generation, from a request to its answers; rank 0 shows them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from toolkit.inference.plan import plan
from toolkit.inference.request import Request
from toolkit.inference.source import Model, open_model
from toolkit.inference.text import Text, TextStream
from toolkit.parallel.rules import GenerationCase, generation_violations, refuse


class Session:
    """A model that is loaded and can be asked again and again; all ranks make it and call it alike."""

    def __init__(self, request: Request) -> None:
        with _without_compiler():
            import toolkit.model.stage  # noqa: F401
        from toolkit.train.world import World, connect

        self.request, self.world = request, World.from_environment()
        started = time.perf_counter()
        self.model: Model = open_model(Path(request.model))
        self.text = Text(self.model, tokenizer=request.tokenizer)
        precision = request.dtype or self.model.precision
        self.config, self.layout = plan(self.model.section, request.overrides, processes=self.world.size, precision=precision)
        connect(self.world, self.layout, seed=0, timeout_s=600.0)
        self.at = self.layout.coordinates(self.world.rank)
        self.load(request)
        self.load_s = time.perf_counter() - started

    def load(self, request: Request) -> None:
        """Read this rank's weights and make them as small as the request says; all ranks call it."""
        self.refuse(request)
        from toolkit.model.savings import Savings
        from toolkit.model.stage import Stage
        from toolkit.parallel.agree import everywhere

        stages: list[Stage] = []
        savings = Savings(weights=request.weights, kv=request.kv, grow=request.grow, prune=request.prune)  # type: ignore[arg-type]

        def load() -> None:
            with self.model.weights(self.config.model.spec) as read:
                tp, rank = self.layout.tp, self.at.tp
                stages.append(
                    Stage(
                        self.config,
                        self.layout,
                        rank=self.world.rank,
                        device=self.world.device,
                        read=lambda weight: read(weight, tp=tp, rank=rank),
                        savings=savings,
                    )
                )

        everywhere(load)
        self.stage = stages[0]

    def refuse(self, request: Request) -> None:
        """Raise LayoutError for savings that do not go together, or not with this model or machine; on all ranks alike."""
        case = GenerationCase.of(
            self.config.model.spec,
            tp=self.layout.tp,
            pp=self.layout.pp,
            weights=request.weights,
            kv=request.kv,
            grow=request.grow,
            prune=request.prune,
            by_part=self.model.by_part,
            cuda=self.world.device.type == "cuda",
        )
        refuse(generation_violations(case))

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt, those that leave no place for an answer refused."""
        from toolkit.inference.generate import check_lengths

        names = ["the prompt"] if len(prompts) == 1 else [f"prompt {i}" for i in range(1, len(prompts) + 1)]
        if self.request.chat:
            ids = [self.text.encode_chat([{"role": "user", "content": p}], name=n) for p, n in zip(prompts, names, strict=True)]
        else:
            ids = [self.text.encode(p, name=n) for p, n in zip(prompts, names, strict=True)]
        check_lengths(ids, context=self.config.model.max_position_embeddings, names=names)
        return ids

    def generate(self, ids: Sequence[Sequence[int]], *, on_token: Any = None) -> list[Any] | None:
        """Answers to all prompts in order on rank 0, None elsewhere. on_token: called on rank 0 with its own copy's tokens."""
        import torch.distributed as dist

        from toolkit.inference.generate import Generator

        r = self.request
        generator = Generator(self.stage, stop=self.text.stop, batch=r.batch)
        mine = [(number, list(one)) for number, one in enumerate(ids)][self.at.dp :: self.layout.dp]
        show = on_token if on_token is not None and self.world.rank == 0 else lambda _number, _token: None
        answers = generator(mine, max_new_tokens=r.max_new_tokens, sampling=r.sampling, on_token=show)
        self.times = generator.times
        if self.layout.dp == 1:
            return answers if self.world.rank == 0 else None
        everyone: list[list[Any]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(everyone, answers if self.at.tp == self.at.pp == 0 else [])
        return sorted((a for part in everyone for a in part), key=lambda a: a.number) if self.world.rank == 0 else None


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Import megatron-core without torch's compiler, a quarter of the start-up.

    It compiles small functions for training as it is imported, and a generation calls none of them.
    """
    import torch

    compiler: Any = torch.compile
    plain: Any = lambda function=None, **_: function if function is not None else lambda inner: inner
    torch.compile = plain
    try:
        yield
    finally:
        torch.compile = compiler


def run(request: Request, *, out: TextIO | None = None) -> None:
    """Generate and show the answers on rank 0: one prompt as it comes, several one after the other, or JSON."""
    out = out or sys.stdout
    session = Session(request)
    ids = session.encode(request.prompts)
    single = len(ids) == 1 and not request.as_json
    stream = TextStream(session.text.tokenizer)

    def show(_number: int, token: int) -> None:
        out.write(stream.push(token))
        out.flush()

    answers = session.generate(ids, on_token=show if single else None)
    if answers is None:
        return
    if single:
        out.write(stream.rest() + "\n")
    elif request.as_json:
        out.write(json.dumps(report(session, request, ids, answers), ensure_ascii=False, indent=1) + "\n")
    else:
        for prompt, answer in zip(request.prompts, answers, strict=True):
            out.write(f"{prompt}{'' if not request.chat else chr(10)}{session.text.decode(answer.tokens)}\n\n")
    out.flush()


def report(session: Session, request: Request, ids: Sequence[Sequence[int]], answers: Sequence[Any]) -> dict[str, Any]:
    """What --json shows."""
    layout, times = session.layout, session.times
    return {
        "model": str(session.model.path),
        "layout": {"processes": layout.world_size, "tp": layout.tp, "pp": layout.pp, "dp": layout.dp},
        "dtype": session.config.train.precision,
        "answers": [
            {
                "prompt": prompt,
                "text": session.text.decode(answer.tokens),
                "prompt_tokens": len(one),
                "tokens": answer.tokens,
                "finish": answer.finish,
            }
            for prompt, one, answer in zip(request.prompts, ids, answers, strict=True)
        ],
        "seconds": {"load": round(session.load_s, 4), "prefill": round(times.prefill, 4), "decode": round(times.decode, 4)},
        "rank_0": {"prompt_tokens": times.prompt_tokens, "decoded_tokens": times.decoded},
    }
