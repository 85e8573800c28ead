"""Which GPU a rank takes."""

from __future__ import annotations

import pytest

from toolkit.errors import MachineError
from toolkit.train.world import device_index


def test_each_rank_its_own() -> None:
    assert [device_index(rank, visible=4, restricted=False) for rank in range(4)] == [0, 1, 2, 3]


def test_a_scheduler_that_shows_each_task_one_gpu() -> None:
    assert [device_index(rank, visible=1, restricted=True) for rank in range(4)] == [0, 0, 0, 0]


@pytest.mark.parametrize(("rank", "visible"), [(1, 1), (4, 2)])
def test_more_processes_than_gpus(rank: int, visible: int) -> None:
    with pytest.raises(MachineError, match=f"local rank {rank} has no GPU: this host shows {visible}"):
        device_index(rank, visible=visible, restricted=False)
