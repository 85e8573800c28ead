"""Stages of unequal length: what each one holds, what is refused, and that the tokens stay those of
one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.inference.asking import DEADLINE_S, IDS, answers, made  # noqa: E402
from toolkit.errors import ConfigError, LayoutError  # noqa: E402
from toolkit.inference.plan import plan  # noqa: E402
from toolkit.inference.source import open_model  # noqa: E402
from toolkit.parallel.generation import counts_of  # noqa: E402

NEW = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("cut"), layers=6)


@pytest.fixture(scope="module")
def expected(pool: Pool, folder: Path) -> Any:
    return answers(pool, folder, new=NEW)


@pytest.mark.parametrize(
    ("world", "overrides", "counts"),
    [
        (2, ["parallel.pp=2"], "5,1"),
        pytest.param(3, ["parallel.pp=3"], "1,3,2", marks=pytest.mark.all_cells),
        (4, ["parallel.tp=2", "parallel.pp=2"], "2,4"),
        (2, ["parallel.pp=2"], "measured"),
        pytest.param(4, ["parallel.tp=2", "parallel.pp=2"], "measured", marks=pytest.mark.all_cells),
        pytest.param(4, ["parallel.pp=4"], "1,1,3,1", marks=pytest.mark.all_cells),  # an even cut into 4 is refused
    ],
)
def test_an_uneven_cut_says_the_same(world: int, overrides: list[str], counts: str, pool: Pool, folder: Path, expected: Any) -> None:
    assert answers(pool, folder, new=NEW, world=world, overrides=overrides, layers_per_stage=counts) == expected


@pytest.mark.parametrize("layout", [(2, "parallel.pp=2"), pytest.param((3, "parallel.pp=3"), marks=pytest.mark.all_cells)])
def test_micro_batches_in_flight_say_the_same(layout: tuple[int, str], pool: Pool, folder: Path) -> None:
    """Seven prompts in batches of five: two and three rows at once in one, one in the other;
    answers end at different places.
    """
    ids = [[5 + 3 * n, 9, 77 + n][: 1 + n % 3] for n in range(7)]
    asked: dict[str, Any] = {"ids": ids, "new": 60, "batch": 5, "sampling": {"temperature": 0.9, "seed": 3}}
    assert answers(pool, folder, world=layout[0], overrides=[layout[1]], **asked) == answers(pool, folder, **asked)


def test_each_rank_reads_its_own_layers_alone(pool: Pool, folder: Path) -> None:
    asked = {"model": str(folder), "overrides": ["parallel.pp=2"], "layers_per_stage": "5,1"}
    first, last = pool.run("tests.inference.run:held", 2, asked, deadline_s=DEADLINE_S)
    spec = open_model(folder).section.spec
    layer = 4 * sum(w.count for w in spec.layer)
    assert first["layers"] == [1, 2, 3, 4, 5] and last["layers"] == [6]
    assert first["read"] - last["read"] == 4 * layer - 4 * spec.after[0].count  # beside 4 layers more, the last norm less
    assert first["read"] == 5 * layer + 4 * spec.before[0].count


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 16 MB, beside which what a process takes now and then is small."""
    return made(tmp_path_factory.mktemp("large"), layers=8, width=512)


@pytest.mark.all_cells  # the kernel counts what every library of the process takes
def test_a_rank_with_less_memory_gets_fewer_layers(pool: Pool, large: Path) -> None:
    """The kernel refuses the even cut on that rank; the measured one fits and says the same."""
    asked = {"model": str(large), "ids": IDS, "max_new_tokens": NEW}
    limited = asked | {"limit": 0.032, "overrides": ["parallel.pp=2"]}
    first, last = pool.run("tests.inference.run:limited", 2, limited, deadline_s=600)
    assert first["layers"] == last["layers"] and 1 <= first["layers"][1] <= 2, first["reasons"]
    assert "the even cut 4,4 does not fit" in first["reasons"][-1], first["reasons"]
    assert "rank 1 ran out of memory for its weights" in first["refused"]
    assert first["tokens"] == answers(pool, large, new=NEW)


@pytest.mark.all_cells  # the kernel counts what every library of the process takes
def test_a_rank_that_becomes_fuller_gives_layers_away_between_batches(pool: Pool, large: Path) -> None:
    ids = [[5, 9, 77], [40], [8, 3, 60, 61], [7, 7], [11]]
    asked = {"model": str(large), "ids": ids, "max_new_tokens": NEW, "batch": 2}
    room = asked | {"limit": 0.1, "overrides": ["parallel.pp=2"]}
    first, last = pool.run("tests.inference.run:fuller", 2, room, deadline_s=600)
    assert first["start"] == [4, 4] and first["end"] == last["end"] and first["end"][1] < 4, first
    assert first["tokens"] == answers(pool, large, ids=ids, new=NEW, batch=2)


@pytest.mark.parametrize(
    ("counts", "overrides", "words"),
    [
        ("3,4", ["parallel.pp=2"], ["7 layers", "model.num_layers=6", "--layers-per-stage 3,3"]),
        ("3,2", ["parallel.pp=2"], ["5 layers", "--layers-per-stage 4,2"]),
        ("6,0", ["parallel.pp=2"], ["without a layer", "--layers-per-stage 5,1"]),
        ("1,1,1,1,1,1,1", ["parallel.pp=7"], ["parallel.pp=7 with model.num_layers=6", "or lower"]),
        ("2,2,2", ["parallel.pp=2"], ["3 stages", "parallel.pp=2", "--layers-per-stage even"]),
    ],
)
def test_counts_that_do_not_fit_the_model(counts: str, overrides: list[str], words: list[str], folder: Path) -> None:
    with pytest.raises(LayoutError) as caught:
        pp = int(overrides[0].rpartition("=")[2])
        plan(open_model(folder).section, overrides, processes=pp, precision="fp32", layers_per_stage=counts)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("word", ["evenly", "10,", "-1,3", "3;3", "", "²,3"])
def test_words_that_are_no_cut(word: str) -> None:
    with pytest.raises(ConfigError, match="--layers-per-stage"):
        counts_of(word)
