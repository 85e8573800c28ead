"""A generation on the ranks of a pool, from ids to ids."""

from __future__ import annotations

from typing import Any


def tokens(asked: dict[str, Any]) -> list[tuple[list[int], str]] | None:
    """(tokens, finish) of each prompt in order, on rank 0; None elsewhere.

    asked: the request's values, and "ids", the prompts.
    """
    from toolkit.inference.request import Request, Sampling
    from toolkit.inference.run import Session

    asked = dict(asked)
    ids = asked.pop("ids")
    sampling = Sampling(**asked.pop("sampling", {}))
    session = Session(Request(prompts=[], sampling=sampling, **{"tokenizer": "bytes", **asked}))
    answers = session.generate(ids)
    return None if answers is None else [(a.tokens, a.finish) for a in answers]
