"""What `toolkit profile` does to a step on a GPU: it must leave the overlap of messages and kernels
as it is.
"""

from __future__ import annotations

from typing import Any

from tests.parity.cells import Cell
from tests.rehearse.inside import played, run_inside

CELL = Cell(2, {"parallel.pp": 2, "zero.stage": 1, "train.micro_batch_size": 2, "train.precision": "bf16"})


def test_the_clock_does_not_make_the_host_wait() -> None:
    """With a synchronisation at each change of part, as it once was, a step of four micro-batches
    waited 34 times more.
    """
    plain, timed = run_inside("tests.rehearse.test_profiler:syncs", {"config": CELL.raw()})
    assert timed["calls"] >= 8, "sends and receives are counted"
    assert timed["syncs"] == plain["syncs"]
    assert timed["taken"] == 1, "the device is waited for once, when the seconds are asked for"
    assert min(timed["seconds"][part] for part in ("forward", "backward", "communication")) > 0
    assert timed["counts"]["communication"] >= timed["calls"] and timed["rows"] > 0


def syncs(argument: dict[str, Any]) -> list[dict[str, Any]]:
    """Host waits of a step, without the profiler's instruments and with them."""
    import torch

    from toolkit.engine.schedule import observed
    from toolkit.profile.clock import Clock, Wire

    with played(argument["config"], world=2) as play:
        play.step()
        found: list[dict[str, Any]] = [{"syncs": sum(play.recorder.step.syncs.values())}]
        clock = Clock(torch.device("cuda", 0))
        wire = Wire(play.layout, play.rank, clock)
        with observed(clock.part), wire.counting():
            play.step()
        waits = play.recorder.step.syncs
        found.append({"syncs": sum(waits.values()), "calls": sum(row.calls for row in wire.rows.values())})
        seconds, counts = clock.take()
        wire.settle()
        found[-1] |= {"taken": sum(waits.values()) - found[-1]["syncs"], "seconds": seconds, "counts": counts}
        return [*found[:-1], found[-1] | {"rows": min(row.seconds for row in wire.rows.values())}]
