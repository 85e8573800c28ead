"""The next prompts are encoded while others are computed, and what is wrong with one is said when
its turn has come, or sooner.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.inference.asking import IDS, answers, made  # noqa: E402
from toolkit.errors import DataError  # noqa: E402
from toolkit.inference.generate import ahead  # noqa: E402

DEADLINE_S = 60


def test_the_next_is_made_while_one_is_used() -> None:
    started = {n: threading.Event() for n in range(3)}

    def make(n: int) -> int:
        started[n].set()
        return 10 * n

    made_so_far = []
    for value, _ in ahead([0, 1, 2], make):
        following = value // 10 + 1
        assert following == 3 or started[following].wait(DEADLINE_S), "the next one waits for this one's end"
        assert following >= 2 or not started[following + 1].is_set(), "no more than one is made ahead"
        made_so_far.append(value)
    assert made_so_far == [0, 10, 20] and list(ahead([], make)) == []


def test_a_mistake_is_raised_in_its_turn() -> None:
    def make(n: int) -> int:
        if n == 1:
            raise DataError("prompt 2 is empty")
        return n

    seen = []
    with pytest.raises(DataError, match="prompt 2 is empty"):
        for value, _ in ahead([0, 1, 2], make):
            seen.append(value)
    assert seen == [0]


def test_prompts_as_text_get_the_answers_of_their_ids(pool: Pool, tmp_path: Path) -> None:
    model = made(tmp_path, layers=2)
    texts = ["".join(map(chr, ids)) for ids in IDS]
    by_ids, by_text = (answers(pool, model, ids=ids, new=4, batch=1) for ids in (IDS, texts))
    assert by_text == by_ids and len(by_ids) == len(IDS)


def test_what_may_be_too_long_is_said_before_anything_is_computed(pool: Pool, tmp_path: Path) -> None:
    """Of prompts that come in several batches, the longest would be the last one to be encoded."""
    asked: dict[str, Any] = {"model": str(made(tmp_path, layers=2)), "batch": 1}  # its context has 64 places
    kept, told = pool.run("tests.inference.run:prepared", 1, asked | {"prompts": ["ab", "c", "d" * 50]}, deadline_s=120)[0]
    assert kept == ["ab", "c", "d" * 50] and told == ""
    for prompts, words in ((["ab", "d" * 64, "c"], "prompt 2 has 64 tokens"), (["ab", "c", ""], "prompt 3 is empty")):
        assert words in pool.run("tests.inference.run:prepared", 1, asked | {"prompts": prompts}, deadline_s=120)[0][1]
