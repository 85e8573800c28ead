"""An error on one rank is raised on all, and no rank waits for another that has failed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pool import Pool
from toolkit.errors import CheckpointError, MachineError, ToolkitError
from toolkit.parallel.agree import everywhere, on_rank_0


def _outcome(action: Any) -> tuple[str, str]:
    try:
        return "value", repr(action())
    except ToolkitError as e:
        return type(e).__name__, str(e)


def on_a_rank(kind: str) -> dict[str, tuple[str, str]]:
    """Run in the pool: rank 1 fails in the given way, or nobody does."""
    import torch.distributed as dist

    def act() -> int:
        if dist.get_rank() == 1:
            if kind == "toolkit":
                raise CheckpointError("checkpoint.dir=x is damaged", fix="Restore it.")
            if kind == "system":
                open("/nowhere/at all")  # noqa: SIM115  it does not exist
            if kind == "bug":
                raise KeyError("a key")
        return dist.get_rank()

    def on_0() -> int:
        if kind == "first":
            raise CheckpointError("checkpoint.dir=y is damaged")
        return 7

    return {"everywhere": _outcome(lambda: everywhere(act)), "on_rank_0": _outcome(lambda: on_rank_0(on_0))}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("toolkit", ("CheckpointError", "checkpoint.dir=x is damaged. Restore it.")),
        ("system", ("MachineError", "/nowhere/at all: No such file or directory. Check the disk and the folder's permissions.")),
        ("bug", ("ToolkitError", "rank 1 failed: KeyError: 'a key'. Its log has the traceback.")),
        ("nobody", ("value", "[0, 1]")),
    ],
)
def test_every_rank_raises_the_same(pool: Pool, kind: str, expected: tuple[str, str]) -> None:
    first, second = pool.run("tests.parallel.test_agree:on_a_rank", 2, kind, deadline_s=120)
    assert first["everywhere"] == second["everywhere"] == expected
    assert (first["on_rank_0"], second["on_rank_0"]) == (("value", "7"), ("value", "None"))


def test_rank_0_fails_for_all(pool: Pool) -> None:
    first, second = pool.run("tests.parallel.test_agree:on_a_rank", 2, "first", deadline_s=120)
    assert first["on_rank_0"] == second["on_rank_0"] == ("CheckpointError", "checkpoint.dir=y is damaged.")


def test_a_process_without_a_world_is_its_only_rank() -> None:
    assert everywhere(lambda: 3) == [3] and on_rank_0(lambda: 4) == 4
    with pytest.raises(MachineError, match="nowhere"):
        everywhere(lambda: open("/nowhere/at all"))  # noqa: SIM115  it does not exist
