"""Seconds and bytes are counted once, for the right part and the right group."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.pool import Pool
from toolkit.parallel.group_names import group_names
from toolkit.parallel.layout import Layout
from toolkit.profile.clock import Clock


def test_inner_parts_take_their_seconds_from_the_outer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(float(i) for i in range(100))
    monkeypatch.setattr("toolkit.profile.clock.time.perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    with clock.part("backward"), clock.part("communication"):
        pass
    seconds, counts = clock.take()
    assert seconds == {"other": 2.0, "backward": 2.0, "communication": 1.0} and counts == {"backward": 1, "communication": 1}
    assert clock.take()[1] == {}


def test_groups_have_the_names_of_their_axes() -> None:
    layout = Layout(tp=2, pp=2, dp=2)
    assert group_names(layout, 0) == {
        (0, 1): "tensor",
        (0, 2): "data",
        (0, 4): "pipeline",
        (0, 1, 4, 5): "model",
        tuple(range(8)): "world",
    }
    assert group_names(Layout(pp=4), 1) == {(0, 1, 2, 3): "pipeline", (0, 3): "embedding"}
    assert group_names(Layout(), 0) == {}


def test_every_byte_on_the_wire_is_counted(pool: Pool) -> None:
    for traffic in pool.run("tests.profile.test_clock:all_kinds", 2, None, deadline_s=60.0):
        assert traffic == {
            "allreduce": (2, 2 * 400),
            "allgather": (2, 2 * 400),
            "broadcast": (1, 80),
            "send": (1, 40),
            "recv": (1, 40),
        }


def all_kinds(_: Any) -> dict[str, tuple[int, int]]:
    import torch.distributed as dist

    from toolkit.profile.clock import Wire

    layout, rank = Layout(dp=2), dist.get_rank()
    own = dist.new_group([rank], use_local_synchronization=True)
    wire = Wire(layout, rank)
    with wire.counting():
        for _again in range(2):
            dist.all_reduce(torch.ones(100))
            dist.all_gather([torch.empty(100) for _ in range(2)], torch.ones(100))
        dist.broadcast(torch.ones(10, dtype=torch.float64), src=0)
        ops = [dist.P2POp(dist.isend, torch.ones(10), 1 - rank), dist.P2POp(dist.irecv, torch.ones(10), 1 - rank)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        dist.all_reduce(torch.ones(1000), group=own)  # of one rank: nothing moves
    dist.all_reduce(torch.ones(7))  # no longer counted
    return {row.operation: (row.calls, row.nbytes) for row in wire.rows.values()}


@pytest.mark.parametrize(("world", "keys"), [(2, {"parallel.pp": 2}), (2, {"parallel.pp": 2, "parallel.vpp": 2, "model.num_layers": 4})])
def test_the_schedule_runs_in_the_order_that_is_drawn(pool: Pool, world: int, keys: dict[str, Any]) -> None:
    from tests.parity.cells import Cell
    from toolkit.parallel.order import order

    cell = Cell(world, {"zero.stage": 1, "train.micro_batch_size": 2, **keys})
    ranks = pool.run("tests.profile.test_clock:order_of_passes", world, {"config": cell.raw()}, deadline_s=120.0)
    vpp = keys.get("parallel.vpp", 1)
    for stage, seen in enumerate(ranks):
        assert seen == [p.kind for p in order(stage=stage, pp=2, vpp=vpp, microbatches=4)]


def order_of_passes(cell: dict[str, Any]) -> list[str]:
    from contextlib import contextmanager

    from tests.cost.run import measure_cell
    from toolkit.profile import live_tensors as measure

    seen: list[str] = []
    around = measure.StepMeter.around

    @contextmanager
    def noting(self: Any, kind: str) -> Any:
        seen.append(kind)
        with around(self, kind):
            yield

    measure.StepMeter.around = noting  # type: ignore[method-assign]
    try:
        measure_cell(cell)
    finally:
        measure.StepMeter.around = around  # type: ignore[method-assign]
    assert any(a != b for a, b in pairwise(seen))
    return seen
