"""The two lines that sum up a run without progress."""

from __future__ import annotations

from pathlib import Path

from toolkit.cluster.stalls import Wait, read_reports, summary, write_report

HOSTS = ["node-1"] * 4 + ["node-2"] * 4


def reduce(rank: int, number: int = 1204) -> Wait:
    return Wait(rank=rank, host=HOSTS[rank], step=41, kind="collective", where="", group="tensor", operation="all-reduce", number=number)


def line(waits: list[Wait]) -> str:
    found = summary({w.rank: w for w in waits}, HOSTS, seconds=30, folder=Path("runs/a"))
    assert len(found) == 2 and "runs/a" in found[1] and "75" in found[1]
    return found[0]


def test_who_waits_for_whom() -> None:
    reader = Wait(rank=7, host="node-2", step=41, kind="data", where="its data loader")
    assert line([*map(reduce, range(7)), reader]) == (
        "no progress for 30 s in step 41: ranks 0–6 wait in all-reduce 1,204 of the tensor group, rank 7 is in its data loader on node-2"
    )


def test_a_rank_that_does_not_answer_is_named() -> None:
    assert line([reduce(r) for r in range(8) if r != 5]).endswith(
        "ranks 0–4, 6–7 wait in all-reduce 1,204 of the tensor group, rank 5 does not answer (node-2)"
    )


def test_ranks_in_different_collectives_are_told_apart() -> None:
    said = line([*map(reduce, range(6)), reduce(6, 1205), reduce(7, 1205)])
    assert said.endswith("ranks 0–5 wait in all-reduce 1,204 of the tensor group, ranks 6–7 wait in all-reduce 1,205 of the tensor group")


def test_many_different_waits_stay_one_line() -> None:
    said = line([reduce(rank, 100 + rank) for rank in range(8)])
    assert said.count("all-reduce") == 4 and said.endswith("ranks 4–7 elsewhere")


def test_reports_come_back_and_half_written_ones_are_passed_over(tmp_path: Path) -> None:
    write_report(tmp_path, reduce(3))
    (tmp_path / "rank-00004.json").write_text('{"rank": 4,')
    assert read_reports(tmp_path) == {3: reduce(3)}
