"""A generation on the ranks of a pool, from ids to ids."""

from __future__ import annotations

import dataclasses
from typing import Any


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


def logits(asked: dict[str, Any]) -> dict[str, Any]:
    """Logits of a prompt and of the tokens after it, one by one, and what the model and its cache take on this rank."""
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
    """Log-probability of each text that may follow a question. asked: the request's values, and "asked": (question, texts) by turns."""
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
    """Bytes of weights and of keys and values of a first stage's rank, as `toolkit estimate --inference` has them."""
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
