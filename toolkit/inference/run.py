"""One rank of a generation, from a request to its answers; rank 0 shows them."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from toolkit.inference.cutting import cut_as_measured, rebalance
from toolkit.inference.plan import plan
from toolkit.inference.request import Request
from toolkit.inference.source import Model, open_model
from toolkit.inference.text import Text, TextStream
from toolkit.parallel.rules import GenerationCase, generation_violations, refuse
from toolkit.plan.cut import StagePace

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.arch.spec import WeightSpec
    from toolkit.inference.generate import Times
    from toolkit.model.savings import Savings

SPECIAL = 8  # tokens at the most that a tokenizer puts around a text
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
        self.prompts = self.prepare(request.prompts)
        """As generate() takes them; what is wrong with one is said before memory is taken, where
        that can be known.
        """
        meeting = f"{request.socket}.meeting" if request.socket else None
        connect(self.world, self.layout, seed=0, timeout_s=600.0, meeting=meeting)
        self.files = ExitStack()
        limit_memory(request.memory_limit, self.world.device)
        self.at = self.layout.coordinates(self.world.rank)
        self.paces: list[StagePace] = []
        """What was measured of each stage, where layers are cut by it."""
        self.reasons: list[str] = []
        self.batch_rows = 1
        """Prompts that this copy computed at once the last time."""
        if request.layers_per_stage == "measured":
            self.refuse(request)
            cut_as_measured(self)
        self.load(request)
        self.load_s = time.perf_counter() - started

    @property
    def savings(self) -> Savings:
        return savings_of(self.request)

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
        sharding = self._sharding(request)

        def load() -> None:
            read = files.enter_context(self.model.weights(self.config.model.spec))
            tp, rank = self.layout.tp, self.at.tp

            def read_part(weight: WeightSpec) -> Tensor:
                part = read(weight, tp=tp, rank=rank)
                self.read_bytes += part.nbytes if self.model.cuts else weight.count * part.itemsize
                return part

            with self.naming_memory("its weights"):
                stages.append(
                    Stage(
                        self.config,
                        self.layout,
                        rank=self.world.rank,
                        device=self.world.device,
                        read=read_part,
                        savings=savings_of(request),
                        sharding=sharding,
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
        if sharding is not None:
            self.files.callback(sharding.close)

    def _sharding(self, request: Request) -> Any:
        """What shares out the layers among the copies of the model, for --offload zero…; None otherwise."""
        if not request.offload.startswith("zero"):
            return None
        from toolkit.inference.zero import Sharding

        return Sharding(self.config, self.layout, place=request.offload, nvme_path=request.nvme_path)

    def naming_memory(self, what: str) -> AbstractContextManager[None]:
        from toolkit.inference.memory import said_when_memory_ends

        r = self.request
        return said_when_memory_ends(what, rank=self.world.rank, offload=r.offload, limit_gib=r.memory_limit)

    def close(self) -> None:
        """Let go of the model's files and of what reads them ahead."""
        self.files.close()

    def refuse(self, request: Request) -> None:
        """Raise LayoutError for savings that do not go together, or not with this model or machine;
        on all ranks alike.
        """
        case = GenerationCase.of(
            self.config.model.spec,
            tp=self.layout.tp,
            pp=self.layout.pp,
            copies=self.layout.dp,
            weights=request.weights,
            kv=request.kv,
            grow=request.grow,
            prune=request.prune,
            offload=request.offload,
            measured=request.layers_per_stage == "measured" or request.rebalance,
            by_part=self.model.by_part,
            cuda=self.world.device.type == "cuda",
        )
        refuse(generation_violations(case))

    def memory(self) -> dict[str, int]:
        """Bytes on this rank: model: of the whole model; weights: of this rank's part; held: the
        most of it that was in memory at once;
        read: of layers that were brought; peak: of the process, on a GPU of PyTorch's allocator.
        """
        from toolkit.inference.memory import peak
        from toolkit.model.savings import weight_bytes

        stage, stream, sharded = self.stage, self.stage.decoder.stream, self.stage.decoder.sharded
        width = 4 if self.config.train.precision == "fp32" else 2
        weights = held = weight_bytes(stage.model)
        if stream is not None:
            weights, held = stage.resident + stream.nbytes, stage.resident + stream.held
        elif sharded is not None:
            away = self.request.offload == "zero-nvme" or (self.request.offload == "zero-cpu" and stage.device.type != "cpu")
            weights, held = stage.resident + sharded.parts, stage.resident + sharded.whole + (0 if away else sharded.parts)
        return {
            "model": self.config.model.spec.parameters * width,
            "weights": weights,
            "held": held,
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

    def prepare(self, prompts: Sequence[str]) -> Sequence[str | list[int]]:
        """Prompts as generate() takes them: ids, or the texts where the next ones can be encoded
        while others are computed.

        What could be too long is looked at now: no tokenizer makes more tokens of a text than it
        has bytes, but for special ones. Several copies have other prompts each, and a mistake must
        end all ranks with one message, so there all of it is done now.
        """
        context = self.config.model.max_position_embeddings
        if self.layout.dp > 1 or len(prompts) <= self.request.batch or self.request.chat:
            return self.encode(prompts)
        for number, prompt in enumerate(prompts):
            if not prompt or len(prompt.encode()) + SPECIAL >= context:
                self._encode_numbered(number, prompt)
        return prompts

    def _encode_numbered(self, number: int, prompt: str) -> list[int]:
        from toolkit.inference.generate import check_lengths

        name = f"prompt {number + 1}"
        ids = self.text.encode(prompt, name=name)
        check_lengths([ids], context=self.config.model.max_position_embeddings, names=[name])
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

    def generate(self, prompts: Sequence[Sequence[int] | str], *, on_token: Any = None) -> list[Any] | None:
        """Answers to all prompts, ids or texts, in order on rank 0, None elsewhere. on_token:
        called on rank 0 with its own copy's tokens.
        """
        import torch.distributed as dist

        from toolkit.inference.generate import NO_TIMES, Generator

        r = self.request

        def fresh(times: Times = NO_TIMES) -> Generator:
            return Generator(self.stage, stop=self.text.stop, batch=r.batch, encode=self._encode_numbered, times=times)

        generator = fresh()
        numbered = [(number, one if isinstance(one, str) else list(one)) for number, one in enumerate(prompts)]
        mine = numbered[self.at.dp :: self.layout.dp]
        each = -(-len(prompts) // self.layout.dp)
        self.batch_rows = min(r.batch, each)
        show = on_token if on_token is not None and self.world.rank == 0 else lambda _number, _token: None
        with self.naming_memory("activations, keys and values" + (", and its layers" if r.offload != "none" else "")):
            if not r.rebalance:
                answers = generator(mine, max_new_tokens=r.max_new_tokens, sampling=r.sampling, on_token=show)
            else:
                mine.sort(key=lambda prompt: len(prompt[1]))
                answers = []
                for start in range(0, each, r.batch):
                    if start:
                        times = generator.times
                        del generator  # it holds the stage, which another one may replace
                        said = rebalance(self)
                        if said is not None and self.world.rank == 0:
                            logger.warning("%s", said)
                        generator = fresh(times)
                    if self.stage.spans is None:
                        self.stage.spans = {}
                    part = mine[start : start + r.batch]
                    answers += generator(part, max_new_tokens=r.max_new_tokens, sampling=r.sampling, on_token=show)
                answers.sort(key=lambda answer: answer.number)
            self.stage.keep_up()
        self.times, self.waited = generator.times, generator.waited
        if self.layout.dp == 1:
            return answers if self.world.rank == 0 else None
        everyone: list[list[Any]] = [[] for _ in range(self.world.size)]
        dist.all_gather_object(everyone, answers if self.at.tp == self.at.pp == 0 else [])
        return sorted((a for part in everyone for a in part), key=lambda a: a.number) if self.world.rank == 0 else None


def savings_of(request: Request) -> Savings:
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
    """Generate and show the answers on rank 0: one prompt as it comes, several one after the other,
    or JSON.
    """
    out = out or sys.stdout
    session = Session(request)
    single = len(session.prompts) == 1 and not request.as_json
    stream = TextStream(session.text.tokenizer)

    def show(_number: int, token: int) -> None:
        out.write(stream.push(token))
        out.flush()

    answers = session.generate(session.prompts, on_token=show if single else None)
    memory = session.memory()
    session.close()
    if answers is None:
        return
    if request.offload != "none":
        logger.warning("%s", memory_line(memory))
    if single:
        out.write(stream.rest() + "\n")
    elif request.as_json:
        out.write(json.dumps(report(session, request, answers), ensure_ascii=False, indent=1) + "\n")
    else:
        for prompt, answer in zip(request.prompts, answers, strict=True):
            out.write(f"{prompt}{'' if not request.chat else chr(10)}{session.text.decode(answer.tokens)}\n\n")
    out.flush()


def report(session: Session, request: Request, answers: Sequence[Any]) -> dict[str, Any]:
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
                "prompt_tokens": answer.prompt_tokens,
                "tokens": answer.tokens,
                "finish": answer.finish,
            }
            for prompt, answer in zip(request.prompts, answers, strict=True)
        ],
        "seconds": {
            "load": round(session.load_s, 4),
            "prefill": round(times.prefill, 4),
            "decode": round(times.decode, 4),
            "prompts": round(session.waited, 4),
        },
        "rank_0": {"prompt_tokens": times.prompt_tokens, "decoded_tokens": times.decoded, "memory": session.memory()},
    }


def memory_line(memory: dict[str, int]) -> str:
    """A rank's memory against the model's size, as a sentence."""
    return (
        f"the model has {memory['model'] / 1e6:,.1f} MB, {memory['weights'] / 1e6:,.1f} MB of them on this rank; at most "
        f"{memory['held'] / 1e6:,.1f} MB were in memory at once, and {memory['peak'] / 1e6:,.0f} MB of everything"
    )
