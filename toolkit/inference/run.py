"""One rank of a generation, from a request to its answers; rank 0 shows them."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from toolkit.cost.generation import Generation
from toolkit.inference.plan import plan
from toolkit.inference.request import Request
from toolkit.inference.source import Model, open_model
from toolkit.inference.text import Text, TextStream
from toolkit.parallel.rules import GenerationCase, generation_violations, refuse
from toolkit.plan.cut import StagePace, choose_cut

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.arch.spec import WeightSpec
    from toolkit.model.savings import Savings

WORTH = 0.05  # a share of time, below which the even cut stays: measuring is no more exact
logger = logging.getLogger(__name__)


class Session:
    """A model that is loaded and can be asked again and again; all ranks make it and call it alike."""

    def __init__(self, request: Request) -> None:
        with _without_compiler():
            import toolkit.model.stage  # noqa: F401
        from toolkit.train.memory import limit_memory
        from toolkit.train.world import World, connect

        self.request, self.world = request, World.from_environment()
        started = time.perf_counter()
        self.model: Model = open_model(Path(request.model))
        self.text = Text(self.model, tokenizer=request.tokenizer)
        precision = request.dtype or self.model.precision
        self.config, self.layout = plan(
            self.model.section, request.overrides, processes=self.world.size, precision=precision, layers_per_stage=request.layers_per_stage
        )
        meeting = f"{request.socket}.meeting" if request.socket else None
        connect(self.world, self.layout, seed=0, timeout_s=600.0, meeting=meeting)
        self.files = ExitStack()
        limit_memory(request.memory_limit, self.world.device)
        self.at = self.layout.coordinates(self.world.rank)
        self.paces: list[StagePace] = []
        """What was measured of each stage, where layers are cut by it."""
        self.reasons: list[str] = []
        if request.layers_per_stage == "measured":
            self.refuse(request)
            self._measure(request)
        self.load(request)
        self.load_s = time.perf_counter() - started

    def _measure(self, request: Request) -> None:
        """Cut the layers by what each stage's device takes for one of them, and by how many it can hold; all ranks call it."""
        from toolkit.inference.pace import Pace, all_stages, measure_layer

        way, in_flight = self._way(request), self._in_flight(request)

        def mine() -> Pace:
            with self._memory("one layer, to measure it"):
                return measure_layer(
                    self.config,
                    self.layout,
                    rank=self.world.rank,
                    device=self.world.device,
                    savings=_savings(request),
                    texts=-(-way.batch // in_flight),
                    room=self._room(request),
                )

        self.paces = all_stages(mine, layout=self.layout, way=way)
        cut = choose_cut(way.model.layers, self.paces, in_flight=in_flight, worth=WORTH)
        self.layout, self.reasons = replace(self.layout, layers_per_stage=cut.counts), cut.reasons
        if self.world.rank == 0:
            for reason in cut.reasons:
                logger.warning("measured: %s", reason)

    def _room(self, request: Request) -> float:
        from toolkit.inference.memory import room

        on_host = int(os.environ.get("LOCAL_WORLD_SIZE", self.world.size))
        return room(self.world.device, limit_gib=request.memory_limit, ranks=on_host)

    def _way(self, request: Request) -> Generation:
        """What the request asks at most, as the estimate has it. No tokenizer makes more tokens of a text than it has bytes."""
        layout, known = self.layout, self.config.model.max_position_embeddings
        longest = max((len(p.encode()) for p in request.prompts), default=known)
        context = min(known, longest + request.max_new_tokens)
        prompts = -(-max(1, len(request.prompts)) // layout.dp)
        return Generation(
            model=self.config.model.spec,
            tp=layout.tp,
            pp=layout.pp,
            dp=layout.dp,
            precision=self.config.train.precision,
            batch=min(request.batch, prompts),
            context=context,
            prompt=min(longest, context),
            weights=request.weights,
            kv=request.kv,
        )

    def _in_flight(self, request: Request) -> int:
        """Micro-batches that the stages compute at the same time."""
        return min(self.layout.pp, self._way(request).batch)

    @property
    def layers_per_stage(self) -> list[int]:
        return [len(self.layout.layers_of(self.config.model.num_layers, stage=s)) for s in range(self.layout.pp)]

    def load(self, request: Request) -> None:
        """Read this rank's weights and make them as small as the request says; all ranks call it."""
        self.refuse(request)
        self.close()
        from toolkit.model.stage import Stage
        from toolkit.parallel.agree import everywhere

        stages: list[Stage] = []
        self.read_bytes = 0
        files = ExitStack()

        def load() -> None:
            read = files.enter_context(self.model.weights(self.config.model.spec))
            tp, rank = self.layout.tp, self.at.tp

            def read_part(weight: WeightSpec) -> Tensor:
                part = read(weight, tp=tp, rank=rank)
                self.read_bytes += part.nbytes if self.model.cuts else weight.count * part.itemsize
                return part

            with self._memory("its weights"):
                stages.append(
                    Stage(
                        self.config,
                        self.layout,
                        rank=self.world.rank,
                        device=self.world.device,
                        read=read_part,
                        savings=_savings(request),
                    )
                )

        try:
            everywhere(load)
        except BaseException:
            files.close()
            raise
        self.stage = stages[0]
        if request.offload == "disk":
            files.callback(self.stage.close)
            self.files = files  # layers are read from them for as long as the model generates
        else:
            files.close()

    def _memory(self, what: str) -> AbstractContextManager[None]:
        from toolkit.inference.memory import said_when_memory_ends

        r = self.request
        return said_when_memory_ends(what, rank=self.world.rank, offload=r.offload, limit_gib=r.memory_limit)

    def close(self) -> None:
        """Let go of the model's files and of what reads them ahead."""
        self.files.close()

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
            offload=request.offload,
            measured=request.layers_per_stage == "measured",
            by_part=self.model.by_part,
            cuda=self.world.device.type == "cuda",
        )
        refuse(generation_violations(case))

    def memory(self) -> dict[str, int]:
        """Bytes on this rank: model: of the whole model; weights: of this rank's part; held: the most of it that was in memory at once;
        read: of layers that were brought; peak: of the process, on a GPU of PyTorch's allocator.
        """
        from toolkit.inference.memory import peak
        from toolkit.model.savings import weight_bytes

        stage, stream = self.stage, self.stage.decoder.stream
        width = 4 if self.config.train.precision == "fp32" else 2
        return {
            "model": self.config.model.spec.parameters * width,
            "weights": stage.resident + stream.nbytes if stream else weight_bytes(stage.model),
            "held": stage.resident + stream.held if stream else weight_bytes(stage.model),
            "read": stream.moved if stream else 0,
            "peak": peak(stage.device),
        }

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

    def encode_one(self, asked: Mapping[str, Any]) -> list[int]:
        """Ids of a conversation ("messages") or of a text ("text")."""
        from toolkit.inference.generate import check_lengths

        if "messages" in asked:
            ids = self.text.encode_chat(asked["messages"], name="the conversation")
        else:
            ids = self.text.encode(asked["text"], name="the text")
        check_lengths([ids], context=self.config.model.max_position_embeddings, names=["the conversation"])
        return ids

    def generate(self, ids: Sequence[Sequence[int]], *, on_token: Any = None) -> list[Any] | None:
        """Answers to all prompts in order on rank 0, None elsewhere. on_token: called on rank 0 with its own copy's tokens."""
        import torch.distributed as dist

        from toolkit.inference.generate import Generator

        r = self.request
        generator = Generator(self.stage, stop=self.text.stop, batch=r.batch)
        mine = [(number, list(one)) for number, one in enumerate(ids)][self.at.dp :: self.layout.dp]
        show = on_token if on_token is not None and self.world.rank == 0 else lambda _number, _token: None
        with self._memory("activations, keys and values" + (", and its layers" if r.offload != "none" else "")):
            answers = generator(mine, max_new_tokens=r.max_new_tokens, sampling=r.sampling, on_token=show)
        self.times = generator.times
        if self.layout.dp == 1:
            return answers if self.world.rank == 0 else None
        everyone: list[list[Any]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(everyone, answers if self.at.tp == self.at.pp == 0 else [])
        return sorted((a for part in everyone for a in part), key=lambda a: a.number) if self.world.rank == 0 else None


def _savings(request: Request) -> Savings:
    from toolkit.model.savings import Savings

    return Savings(**{name: getattr(request, name) for name in ("weights", "kv", "grow", "prune", "offload")})


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
    memory = session.memory()
    session.close()
    if answers is None:
        return
    if request.offload != "none":
        logger.warning("%s", memory_line(memory))
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
        "layout": {
            "processes": layout.world_size,
            "tp": layout.tp,
            "pp": layout.pp,
            "dp": layout.dp,
            "layers_per_stage": session.layers_per_stage,
        },
        "measured": {
            "stages": [{"layer_s": p.layer, "ends_s": p.ends, "layers_that_fit": p.most} for p in session.paces],
            "reasons": session.reasons,
        },
        "dtype": session.config.train.precision,
        "savings": {name: getattr(request, name) for name in ("weights", "kv", "grow", "prune", "offload")},
        "auto": request.auto,
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
        "rank_0": {"prompt_tokens": times.prompt_tokens, "decoded_tokens": times.decoded, "memory": session.memory()},
    }


def memory_line(memory: dict[str, int]) -> str:
    """A rank's memory against the model's size, as a sentence."""
    return (
        f"the model has {memory['model'] / 1e6:,.1f} MB, {memory['weights'] / 1e6:,.1f} MB of them on this rank; at most "
        f"{memory['held'] / 1e6:,.1f} MB were in memory at once, and {memory['peak'] / 1e6:,.0f} MB of everything"
    )
