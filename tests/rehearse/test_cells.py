"""The default parity cells rehearsed as CUDA, one rank of each stage: messages, host waits and
operators on the CPU, each held to a bound.

In every test run a cover of them, chosen by what a GPU does differently; all with `make test-all`.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import pytest

from tests.parity.cells import Cell, always
from tests.rehearse.many import Task, rehearse_many
from toolkit.config.load import parse_config
from toolkit.parallel.group_names import group_names
from toolkit.parallel.layout import Layout
from toolkit.rehearse import match, play
from toolkit.rehearse.session import choose_ranks


def features(cell: Cell) -> set[tuple[Any, ...]]:
    """What decides which code runs on a GPU, each together with the ZeRO stage."""
    k, (tp, pp, vpp) = cell.keys, degrees(cell)
    found = {
        "tp": (tp > 1, bool(k.get("parallel.sequence_parallel"))),
        "pp": (pp > 1, vpp > 1),
        "copies": cell.world // (tp * pp) > 1,
        "offload": (k.get("zero.offload_optimizer", "none"), k.get("zero.offload_param", "none")),
        "precision": cell.precision,
        "recompute": k.get("train.recompute", "none"),
        "optimizer": k.get("optimizer.name", "adamw"),
        "tied": bool(k.get("model.tie_embeddings")) and pp > 1,
        "DeepSpeed": str(sorted(k.get("zero.deepspeed", {}).get("zero_optimization", {}))),
    }
    cp = k.get("parallel.cp", 1)
    alone = {  # what no ZeRO stage does otherwise
        "exchange": (k.get("parallel.cp_exchange"), cell.world // (tp * pp * cp) > 1),
        "documents": (k.get("data.document_mask"), cp > 1),
        "pieces": k.get("train.chunked_loss"),
    }
    return {(k.get("zero.stage", 0), name, value) for name, value in found.items()} | set(alone.items())


def degrees(cell: Cell) -> tuple[int, int, int]:
    return tuple(cell.keys.get(f"parallel.{d}", 1) for d in ("tp", "pp", "vpp"))  # type: ignore[return-value]


def overlaps(cell: Cell) -> bool:
    """Whether DeepSpeed's overlap_comm is on."""
    return "overlap_comm" in cell.keys.get("zero.deepspeed", {}).get("zero_optimization", {})


@functools.cache
def cover() -> list[Cell]:
    """As few of the default cells as have every feature of them all; the fewest stages and ranks first."""
    candidates = sorted(always(), key=lambda c: (degrees(c)[1], c.world))
    wanted, chosen = set().union(*map(features, candidates)), []
    while wanted:
        best = max(candidates, key=lambda c: len(features(c) & wanted))
        wanted -= features(best)
        chosen.append(best)
    return chosen


def layout_of(cell: Cell) -> Layout:
    return Layout.of(parse_config(cell.raw()), cell.world)


@functools.cache
def rehearsed(all_cells: bool) -> dict[str, list[dict[str, Any]]]:
    """A rank of each stage of each cell."""
    cells = always() if all_cells else cover()
    tasks = [Task(c, rank) for c in cells for rank in choose_ranks("stages", layout_of(c), worst=lambda: 0)]
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for task, answer in zip(tasks, rehearse_many(tasks), strict=True):
        assert "error" not in answer, f"{task.cell.id}: {answer['trace']}"
        found[task.cell.id].append(answer)
    return found


def _parameter(cell: Cell) -> Any:
    return pytest.param(cell, id=cell.id, marks=[] if cell in cover() else [pytest.mark.all_cells])


@pytest.fixture
def answers(cell: Cell, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return rehearsed(bool(request.config.option.all_cells))[cell.id]


every_cell = pytest.mark.parametrize("cell", [_parameter(c) for c in always()])


@every_cell
def test_stages_agree(cell: Cell, answers: list[dict[str, Any]]) -> None:
    layout = layout_of(cell)
    for part in ("step", "evaluation"):
        assert match.compare({rank: sent for rank, (_, sent) in match.cast(layout, answers, part=part).items()}) == []
    assert play.play(match.cast(layout, answers)).findings == []


@every_cell
def test_messages_are_the_fewest_of_the_layout(cell: Cell, answers: list[dict[str, Any]]) -> None:
    layout = layout_of(cell)
    for a in answers:
        names, found = group_names(layout, a["rank"]), defaultdict[tuple[str, str], int](int)
        for operation, group, *_ in a["step"]["messages"]:
            name = names.get(match.expand(a["groups"][group]), "part of data")
            found["" if operation in ("send", "recv") else name, operation] += 1
        bounds = fewest(cell, layout, a)
        wrong = {key: (found.get(key, 0), bounds.get(key, (0, 0))) for key in found.keys() | bounds.keys()}
        wrong = {key: (n, (least, most)) for key, (n, (least, most)) in wrong.items() if not least <= n <= most}
        assert not wrong, f"stage {a['stage']}: (found, (fewest, most)) of {wrong}"


# messages of a layer between context-parallel ranks: operation, in a forward, in a backward; of a
# ring, each rank's own
EXCHANGED: dict[str, list[tuple[str, Any, Any]]] = {
    "allgather": [("allgather", lambda cp: 1, lambda cp: 0), ("reduce_scatter", lambda cp: 0, lambda cp: 1)],
    "ulysses": [("alltoall", lambda cp: 2, lambda cp: 2)],
    "ring": [(operation, lambda cp: cp - 1, lambda cp: 2 * cp - 1) for operation in ("send", "recv")],
}


def fewest(cell: Cell, layout: Layout, answer: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int]]:
    """How many messages of each kind one rank's step needs, and how many it may have: (group,
    operation) -> (fewest, most).

    Where the two differ, the comment says what for.
    """
    k, n, (tp, pp, vpp), stage = cell.keys, answer["microbatches"], degrees(cell), answer["stage"]
    zero, model = k.get("zero.stage", 0), parse_config(cell.raw()).model
    muon = k.get("optimizer.name") == "muon"
    layers = sum(len(layout.layers_of(model.num_layers, stage=stage, chunk=c)) for c in range(vpp))
    first, last = stage == 0, stage == pp - 1
    names = group_names(layout, answer["rank"])
    found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def add(group: str, operation: str, least: int, most: int | None = None) -> None:
        found[group, operation][0] += least
        found[group, operation][1] += least if most is None else most

    if cell.world > 1:
        add(names[tuple(range(cell.world))], "allreduce", 3)  # the norm, and the two on which ranks agree at the end
    if pp > 1:
        passes = n * (vpp - last) + n * (vpp - first)  # activations to the next chunk, gradients to the one before
        add("", "send", passes), add("", "recv", passes)
        if model.tie_embeddings and (first or last):
            add("pipeline" if pp == 2 else "embedding", "allreduce", 1)
    if tp > 1:
        again = 2 * layers if k.get("train.recompute") == "full" else 0
        learned = model.spec.positions > 0
        losses = 2 if k.get("train.chunked_loss") == "always" else 3  # in pieces, the sums travel together
        partial = model.spec.qk_norm  # parameters of which each rank has a part of the gradient
        if layout.sequence_parallel:
            partial = True
            add("tensor", "allgather", n * (6 * layers + first + 2 * last + again))
            add("tensor", "reduce_scatter", n * (4 * layers + (first and not learned) + last + again))
            # learned positions are added before the sequence is cut
            add("tensor", "allreduce", n * (losses * last + (first and learned)))
        else:
            add("tensor", "allreduce", n * (4 * layers + first + last + losses * last + again))
        if partial:
            # once a step from the flat gradients; ZeRO-2 and 3 hand each gradient on as soon as it is there
            each = n * (10 * layers + 4)
            add("tensor", "allreduce", 1, each if zero >= 2 or "zero.offload_optimizer" in k else 1)
        if muon:
            add("tensor", "allgather", 1, 4 * layers)  # matrices are orthogonalised whole; a ZeRO-1 rank updates those it has
    if layout.cp > 1:
        redone = k.get("train.recompute", "none") != "none"
        for operation, forward, backward in EXCHANGED[k["parallel.cp_exchange"]]:
            each = n * layers * (forward(layout.cp) * (2 if redone else 1) + backward(layout.cp))
            add("" if operation in ("send", "recv") else "context", operation, each)
    if k.get("data.document_mask") and layout.dp > 1:
        add("data", "allreduce", 1)  # how many tokens of the global batch count
    if layout.copies > 1:
        data = "data" if layout.dp > 1 else "context"
        # optimizer groups: with weight decay, without, Muon's matrices, the tied embedding
        groups, weights = (2, 4), 10 * layers + 4
        offloaded = k.get("zero.offload_optimizer", "none") != "none"
        if zero == 0:
            add(data, "allreduce", *groups)
        elif zero == 3:
            # what is small stays whole, and what is needed again at once is kept; else forward and
            # backward gather it
            add(data, "allgather", n, (2 * n + 1) * weights)
            add(data, "reduce_scatter", n * vpp)
            if "zero.deepspeed" in k:
                add("part of data", "allgather", 0, 2 * n * weights)  # hpZ: within its smaller groups
        else:
            add(data, "allgather", *groups)
            if muon:
                add(data, "allreduce", 0, 1)  # updates of matrices that two ranks share
            if zero == 1 and not offloaded:
                add(data, "reduce_scatter", *groups)
            else:
                # DeepSpeed sums a bucket over all ranks and keeps a part; ZeRO-2 does so in each micro-batch
                add(data, "allreduce", 1, n * vpp * 2)
    return {key: (least, most) for key, (least, most) in found.items() if most}


# What may wait for the device in a step, and how often at most: by the function that asks, for
# which cells, for n micro-batches and w weights. DeepSpeed's offload and ZeRO-3 wait; a step
# without them waits for its norm and for what ranks agree on.
OPTIMIZER_ON_CPU, ZERO_3 = "zero.offload_optimizer", "zero.stage"
WAITS: dict[str, tuple[str, Any]] = {
    "is_invalid_grad_norm": ("", lambda n, w: 5),  # once for each optimizer group and once for all
    "_agree": ("", lambda n, w: 2),
    "sum_tied": (OPTIMIZER_ON_CPU, lambda n, w: 2),
    "update_offload_overflow_tracker": (OPTIMIZER_ON_CPU, lambda n, w: n * w),
    "_wait_for_offload_copies": (OPTIMIZER_ON_CPU, lambda n, w: n * w),
    "_reassign_or_swap_out_partitioned_parameters": (ZERO_3, lambda n, w: 4),
    "_allgather_params_coalesced": (ZERO_3, lambda n, w: n * w + 1),
    "_allgather_params_sequential": (ZERO_3, lambda n, w: 2),
    "_all_gather_sequential": (ZERO_3, lambda n, w: n * w),
    "<listcomp>": (ZERO_3, lambda n, w: 2 * n * w),
    "wait": (ZERO_3, lambda n, w: 2 * n * w),
    "independent_gradient_partition_epilogue": ("ZeRO-3, or overlap_comm at ZeRO-2", lambda n, w: n),
}
# what runs on the CPU: the optimizer there with its gradients, the copy of its result, and
# comparing states of random generators
ON_CPU = {
    "step",
    "unscale_and_clip_grads",
    "_reassign_or_swap_out_partitioned_parameters",
    "buffer_to_accumulate_to_in_cpu",
    "_forget_gradients",
}


@every_cell
def test_the_host_waits_where_it_is_known_to(cell: Cell, answers: list[dict[str, Any]]) -> None:
    k = cell.keys
    applies = {
        "": True,
        OPTIMIZER_ON_CPU: k.get(OPTIMIZER_ON_CPU) == "cpu",
        ZERO_3: k.get(ZERO_3) == 3,
        "ZeRO-3, or overlap_comm at ZeRO-2": k.get(ZERO_3) == 3 or (k.get(ZERO_3) == 2 and overlaps(cell)),
    }
    for a in answers:
        n, w = a["microbatches"] * degrees(cell)[2], 10 * k.get("model.num_layers", 2) + 4
        waits: dict[str, int] = defaultdict(int)
        for _, place, count in a["step"]["syncs"]:
            waits[place.split()[-1]] += count
        unknown = {name: count for name, count in waits.items() if name not in WAITS or not applies[WAITS[name][0]]}
        assert not unknown, f"stage {a['stage']} has new waits: {unknown}"
        most = {name: (count, WAITS[name][1](n, w)) for name, count in waits.items()}
        assert all(count <= bound for count, bound in most.values()), most
        assert [place.split()[-1] for _, place, _ in a["save"]["syncs"]] == ["copied"]
        evaluation = {place.split()[-1] for _, place, _ in a["evaluation"]["syncs"]}
        assert evaluation <= {"evaluate"} | ({"wait", "_partition_param_sec"} if k.get(ZERO_3) == 3 else set())


@every_cell
def test_operators_run_on_the_device(cell: Cell, answers: list[dict[str, Any]]) -> None:
    allowed = {"fork"} | (ON_CPU if cell.uses("cpu") else set())
    for a in answers:
        for part in ("step", "evaluation", "save"):
            strays = [row for row in a[part]["elsewhere"] if row[1].split()[-1] not in allowed]
            assert not strays, strays


@every_cell
def test_the_next_batch_is_on_its_way_before_the_host_waits(cell: Cell, answers: list[dict[str, Any]]) -> None:
    """Fetched once the loss had been read, it left the device idle."""
    if cell.uses("cpu") or cell.keys.get(ZERO_3) == 3 or overlaps(cell):
        return  # there the host waits in each forward or backward too
    for a in answers:
        if a["stage"] not in (0, degrees(cell)[1] - 1) and not cell.keys.get("data.document_mask"):
            continue  # reads no data
        program = a["step"]["program"]
        before = program[: program.index(["sync"])]
        copies = [name for kind, *rest in before if kind == "run" and rest[2] == "between" for name, _ in rest[1]]
        arrays = 4 if cell.keys.get("data.document_mask") else 2
        assert copies.count("copy aten::_to_copy") == arrays * a["microbatches"], "tokens and labels of each micro-batch, positions, mask"


def test_the_cover_covers() -> None:
    assert set().union(*map(features, cover())) == set().union(*map(features, always()))
    assert len(cover()) < len(always()) / 2
