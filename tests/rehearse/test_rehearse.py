"""Parity cells rehearsed as CUDA: the branches that only a GPU takes, their messages against the
fewest a layout needs, their waits.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest

from tests.cost.test_own_engine_runs import grid
from tests.parity.cells import Cell
from tests.rehearse.against import STATES, Point, compare, kept
from toolkit.config.load import parse_config
from toolkit.parallel.layout import Layout
from toolkit.rehearse import match, play
from toolkit.rehearse.session import Job, run

HARDWARE = "h100-80gb:8x1"
BF16 = {"train.precision": "bf16"}
CELLS = [
    Cell(2, {"parallel.tp": 2, "parallel.sequence_parallel": True, "zero.stage": 1} | BF16),
    Cell(2, {"zero.stage": 1}),
    Cell(2, {"parallel.pp": 2, "zero.stage": 1, "train.micro_batch_size": 2} | BF16),
    Cell(2, {"parallel.pp": 2, "parallel.vpp": 2, "model.num_layers": 4, "zero.stage": 2, "train.micro_batch_size": 2} | BF16),
    Cell(2, {"zero.stage": 3, "model.family": "gpt"} | BF16),
    Cell(2, {"zero.stage": 2, "zero.offload_optimizer": "cpu"} | BF16),
    # this one ended in "Tensor list must have at least one tensor": DeepSpeed keeps no sums in host
    # memory in 16 bits
    Cell(2, {"parallel.pp": 2, "parallel.vpp": 2, "model.num_layers": 4, "zero.stage": 2, "zero.offload_optimizer": "cpu"} | BF16),
]
TP, DP, PP, VPP, ZERO3, OFFLOAD, _ = (c.id for c in CELLS)
# at the end of a step all ranks agree on the loss (a sum) and on what else they must see alike (a maximum)
AGREED = 2
# The host reads the norm once for each optimizer group and once for all, to skip a step that is not
# finite; then what ranks agreed on.
READS = {("a value is read", "is_invalid_grad_norm"), ("a value is read", "_agree"), ("a copy between host and device", "_agree")}


def every() -> list[Cell]:
    known = {c.id for c in CELLS}
    return [*CELLS, *(c for c in grid() if not c.uses("cpu") and c.id not in known)]


@functools.cache
def rehearsed(all_cells: bool) -> dict[str, list[dict[str, Any]]]:
    """All ranks of all cells, in one interpreter."""
    cells = every() if all_cells else CELLS
    jobs = [(c, Job(config=parse_config(c.raw()), world=c.world, rank=r, hardware=HARDWARE)) for c in cells for r in range(c.world)]
    answers = run([job for _, job in jobs])
    found: dict[str, list[dict[str, Any]]] = {}
    for (cell, _), answer in zip(jobs, answers, strict=True):
        assert "error" not in answer, f"{cell.id}: {answer['trace']}"
        found.setdefault(cell.id, []).append(answer)
    return found


def calls(answer: dict[str, Any]) -> Counter[str]:
    return Counter(m[0] for m in answer["step"]["messages"])


def _parameter(cell: Cell) -> Any:
    return pytest.param(cell, id=cell.id, marks=[] if cell in CELLS else [pytest.mark.all_cells])


@pytest.mark.parametrize("cell", [_parameter(c) for c in every()])
def test_a_cell_runs_on_the_gpu_and_its_ranks_agree(cell: Cell, request: pytest.FixtureRequest) -> None:
    answers = rehearsed(bool(request.config.option.all_cells))[cell.id]
    layout = Layout.of(parse_config(cell.raw()), cell.world)
    cast = match.cast(layout, answers)
    assert match.compare({rank: sent for rank, (_, sent) in cast.items()}) == []
    played = play.play(cast)
    assert played.findings == [] and played.step_s > 0
    for a in answers:
        assert a["allocated"] == sum(a["step"]["peak"]["parts"].values())
        assert a["allocated"] <= a["peak_reserved"]
        if cell.uses("cpu"):
            continue
        point = Point(cell.id, cell.raw(), cell.world, a["stage"])
        off = compare(point, kept(point, a))["off"]
        assert all(abs(off[part]) < 0.01 for part in STATES), off
        devices = [row for row in a["step"]["elsewhere"] if "random.py" not in row[1] and row[1]]
        assert devices == []
        waits = [row for row in a["step"]["syncs"] if (row[0], row[1].split()[-1]) not in READS]
        if cell.keys["zero.stage"] < 3:
            assert waits == [], "the host must not wait for the device within a step"


def test_offloaded_gradients_are_scaled_where_they_are() -> None:
    """With the norm left on the GPU this step ends in "two devices": it did, before the first
    rehearsal of it.
    """
    answer = rehearsed(False)[OFFLOAD][0]
    assert any(what == "aten::mul_" and "unscale_and_clip_grads" in place for what, place, _ in answer["step"]["elsewhere"])
    assert answer["parts"]["optimizer"] == 0


def test_sequence_parallel_layers_send_the_fewest_messages() -> None:
    """A layer gathers twice forward and four times backward, and scatters twice in each; embedding
    and loss add theirs.
    """
    answer = rehearsed(False)[TP][0]
    n, layers = answer["microbatches"], 2
    found = calls(answer)
    assert found["allgather"] == n * (6 * layers + 1 + 2)
    assert found["reduce_scatter"] == n * (4 * layers + 1 + 1)
    assert found["allreduce"] == n * 3 + 2 + AGREED  # the loss; the norms' gradients and the norm once a step


def test_zero_1_scatters_and_gathers_each_group_once_a_step() -> None:
    """NCCL's reduce-scatter, which gloo never runs."""
    assert calls(rehearsed(False)[DP][0]) == {"reduce_scatter": 2, "allgather": 2, "allreduce": 1 + AGREED}


def test_a_pipeline_sends_one_message_a_micro_batch_each_way() -> None:
    first, last = rehearsed(False)[PP]
    n = first["microbatches"]
    assert calls(first) == {"send": n, "recv": n, "allreduce": 1 + AGREED}
    assert calls(last) == {"send": n, "recv": n, "allreduce": 1 + AGREED}
    assert all(m[5] is not None for m in first["step"]["messages"] if m[0] == "send"), "batched sends cannot cross"


def test_an_interleaved_pipeline_sends_each_chunk() -> None:
    first, last = rehearsed(False)[VPP]
    n = first["microbatches"]
    # three of four borders between chunks, each crossed forward and backward
    assert calls(first)["send"] + calls(last)["send"] == 2 * 3 * n


def test_kernels_of_a_gpu_are_those_that_run() -> None:
    kernels = rehearsed(False)[TP][0]["step"]["kernels"]
    layers, n = 2, rehearsed(False)[TP][0]["microbatches"]
    assert kernels["aten::_scaled_dot_product_flash_attention"] == layers * n
    assert kernels["rehearse::rms_norm"] == (2 * layers + 1) * n


def test_the_peak_is_placed() -> None:
    peak = rehearsed(False)[ZERO3][0]["step"]["peak"]
    assert peak["phase"].split()[0] in ("forward", "backward", "optimizer") and peak["operator"].startswith(("aten::", "rehearse::"))


def test_a_skipped_all_reduce_of_a_real_step_is_found() -> None:
    """A rank that leaves one out, in what the program itself sent."""
    import copy

    answers = copy.deepcopy(rehearsed(False)[TP])
    number = next(i for i, m in enumerate(answers[1]["step"]["messages"]) if m[0] == "allreduce")
    place = answers[1]["step"]["messages"].pop(number)[-1]
    cast = match.cast(Layout(tp=2), answers)
    (found,) = match.compare({rank: sent for rank, (_, sent) in cast.items()})
    assert place.split(":")[0] in found.text and "rank 1" in found.text
