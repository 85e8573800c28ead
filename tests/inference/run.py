"""A generation on the ranks of a pool, from ids to ids."""

from __future__ import annotations

import dataclasses
from typing import Any

M_MMAP_THRESHOLD = -3  # malloc.h


def tokens(asked: dict[str, Any]) -> list[tuple[list[int], str]] | None:
    """(tokens, finish) of each prompt in order, on rank 0; None elsewhere.

    asked: the request's values, and "ids", the prompts.
    """
    return tokens_and_memory(asked)[0]


def tokens_and_memory(asked: dict[str, Any]) -> tuple[list[tuple[list[int], str]] | None, dict[str, int]]:
    """The same, and what this rank says of its memory."""
    from toolkit.inference.request import Request, Sampling
    from toolkit.inference.run import Session

    asked = dict(asked)
    ids = asked.pop("ids")
    sampling = Sampling(**asked.pop("sampling", {}))
    session = Session(Request(prompts=[], sampling=sampling, **{"tokenizer": "bytes", **asked}))
    answers = session.generate(ids)
    memory = session.memory()
    session.close()
    return None if answers is None else [(a.tokens, a.finish) for a in answers], memory


def prepared(asked: dict[str, Any]) -> tuple[list[Any], str]:
    """What is left of a command's prompts to be encoded while others are computed, or what is wrong
    with one of them.
    """
    from toolkit.errors import ToolkitError
    from toolkit.inference.request import Request
    from toolkit.inference.run import Session

    try:
        return list(Session(Request(tokenizer="bytes", **asked)).prompts), ""
    except ToolkitError as error:
        return [], str(error)


def warm_up(asked: dict[str, Any]) -> None:
    """Take once, before a limit counts, what a process takes at its first use of anything; and give
    back what is large as it is freed.
    """
    import ctypes
    import gc

    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 17)  # malloc raises it by itself, and freed layers then lie in the heap between other things
    tokens_and_memory(asked)
    gc.collect()
    libc.malloc_trim(0)


def limited(asked: dict[str, Any]) -> dict[str, Any]:
    """Tokens by layers as measured where the kernel lets rank 1 take only asked["limit"] GiB more,
    and what it says to the even cut.
    """
    import ctypes
    import gc
    import resource

    from toolkit.errors import OutOfMemory
    from toolkit.inference.request import Request
    from toolkit.inference.run import Session
    from toolkit.train.world import World

    asked, world = dict(asked), World.from_environment()
    limit = asked.pop("limit")
    warm_up(asked)
    ids = asked.pop("ids")
    asked |= {"tokenizer": "bytes", "memory_limit": limit if world.rank == 1 else None}
    before = resource.getrlimit(resource.RLIMIT_DATA)
    found: dict[str, Any] = {}
    trim = ctypes.CDLL(None).malloc_trim
    try:
        trim(0)  # what earlier cells have freed would be room beside the limit
        try:
            Session(Request(prompts=[], **asked))
        except OutOfMemory as error:
            found["refused"] = str(error)
        gc.collect()
        resource.setrlimit(resource.RLIMIT_DATA, before)
        trim(0)
        session = Session(Request(prompts=["-" * max(map(len, ids))] * len(ids), layers_per_stage="measured", **asked))
        answers = session.generate(ids)
        found |= {"tokens": answers and [(a.tokens, a.finish) for a in answers], "layers": session.layers_per_stage}
        found |= {"reasons": session.reasons}
        session.close()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    return found


def fuller(asked: dict[str, Any]) -> dict[str, Any]:
    """Tokens where rank 1's memory fills up with something else before the first batch, with --rebalance."""
    import ctypes
    import resource

    from toolkit.inference.memory import room
    from toolkit.inference.request import Request
    from toolkit.inference.run import Session
    from toolkit.train.world import World

    asked, world = dict(asked), World.from_environment()
    limit = asked.pop("limit") if world.rank == 1 else None
    asked.pop("limit", None)
    warm_up(asked)
    ids = asked.pop("ids")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    ctypes.CDLL(None).malloc_trim(0)
    other = []
    try:
        prompts = ["-" * max(map(len, ids))] * len(ids)
        session = Session(Request(prompts=prompts, tokenizer="bytes", memory_limit=limit, rebalance=True, **asked))
        start = session.layers_per_stage
        while limit is not None and room(world.device, limit_gib=None, ranks=1) > 4 * 2**20:
            other.append(bytearray(2**16))
        answers = session.generate(ids)
        found = {"tokens": answers and [(a.tokens, a.finish) for a in answers], "start": start, "end": session.layers_per_stage}
        session.close()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    return found


def held(asked: dict[str, Any]) -> dict[str, Any]:
    """What this rank has read: bytes, and the numbers of its layers, counted from 1."""
    from toolkit.inference.request import Request
    from toolkit.inference.run import Session

    session = Session(Request(prompts=[], tokenizer="bytes", **asked))
    found = {"read": session.read_bytes, "layers": [layer.number for layer in session.stage.decoder.layers], "reasons": session.reasons}
    session.close()
    return found


def logits(asked: dict[str, Any]) -> dict[str, Any]:
    """Logits of a prompt and of the tokens after it, one by one, and what the model and its cache
    take on this rank.
    """
    import torch

    from toolkit.inference.request import Request
    from toolkit.inference.run import Session
    from toolkit.model.savings import LINEARS, weight_bytes

    asked = dict(asked)
    kind = asked.pop("cache", "plain")
    session = Session(Request(prompts=[], tokenizer="bytes", **asked))
    stage = session.stage
    if kind == "cpu":  # the command refuses it without a GPU
        stage.savings = dataclasses.replace(stage.savings, kv="cpu")
    ids = torch.arange(3, 27).view(2, 12)
    cache = stage.cache(batch=2, length=40)
    parts = []
    with torch.no_grad():
        for piece in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):
            found = stage.forward(piece, cache, everywhere=True)
            assert found is not None
            parts.append(found)
    weights = [p for n, p in stage.model.named_parameters() if n.endswith(tuple(f"{name}.weight" for name in LINEARS))]
    plain = not hasattr(weights[0], "__tensor_flatten__")
    return {
        "logits": torch.cat(parts, dim=1).numpy(),
        "weight_bytes": weight_bytes(stage.model),
        "cache_bytes": cache.nbytes,
        "sent": getattr(cache, "sent", 0),
        "expected": _expected(asked, session),
        "zeros": sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights) if plain else None,
    }


def choices(asked: dict[str, Any]) -> list[list[float]]:
    """Log-probability of each text that may follow a question. asked: the request's values, and
    "asked": (question, texts) by turns.
    """
    import torch

    from toolkit.inference.request import Request
    from toolkit.inference.run import Session

    asked = dict(asked)
    questions = asked.pop("asked")
    session = Session(Request(prompts=[], **asked))

    def log_probability(question: str, answer: str) -> float:
        before = len(session.text.encode(question, name="a question"))
        ids = torch.tensor([session.text.encode(question + answer, name="a question with its answer")])
        logits = session.stage.forward(ids[:, :-1], session.stage.cache(batch=1, length=ids.shape[1]), everywhere=True)
        assert logits is not None
        found = logits.log_softmax(-1)[0].gather(1, ids[0, 1:, None])
        return float(found[before - 1 :].sum())

    with torch.no_grad():
        return [[log_probability(question, answer) for answer in answers] for question, answers in questions]


def _expected(asked: dict[str, Any], session: Any) -> tuple[float, float]:
    """Bytes of weights and of keys and values of a first stage's rank, as
    `toolkit estimate --inference` has them.
    """
    from toolkit.cost.generation import Generation, generation_memory
    from toolkit.hardware.catalogue import parse_hardware

    savings = {name: asked[name] for name in ("weights", "kv") if name in asked}
    layout, precision = session.layout, session.config.train.precision
    cut = {"tp": layout.tp, "pp": layout.pp, "precision": precision}
    way = Generation(model=session.config.model.spec, batch=2, context=40, prompt=12, **cut, **savings)
    stage = generation_memory(way, parse_hardware("cpu:1")).stages[0]
    return stage.weights, stage.cache


def bench(asked: dict[str, Any]) -> dict[str, Any] | None:
    """bench-inference with three of its variants, over whatever text comes with Python."""
    from toolkit.inference import bench as module
    from toolkit.inference.request import Request

    module.VARIANTS = ({}, {"kv": "int8"}, {"offload": "disk"})
    module.WINDOW = 32
    return module.measure(Request(prompts=[], tokenizer="bytes", bench="", **asked))
