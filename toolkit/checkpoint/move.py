"""State of any layout into an engine of any other: every rank reads its own parts of the whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.arch.spec import Cut
from toolkit.checkpoint.whole import MASTER, WholeCheckpoint
from toolkit.engine.state import EngineState
from toolkit.errors import CheckpointError
from toolkit.parallel.agree import everywhere

_BUFFER = 1 << 24  # elements at a time where values go to a device or change their type


def fill(state: EngineState, whole: WholeCheckpoint, *, tp: int, tp_rank: int, weights_only: bool = False) -> None:
    """Weights, optimizer states and its step count from a whole checkpoint; all ranks call it.

    weights_only: leave the optimizer as new. CheckpointError on all ranks, before anything is
    changed, where a parameter is missing or
    of another shape. Memory: a buffer; values go straight to where the optimizer has them.
    """

    def read(out: Tensor, name: str, key: str, start: int) -> None:
        stored = whole.dtype(name, key)
        if out.device.type == "cpu" and out.dtype == stored:
            whole.read_into(out, name, key, tp=tp, rank=tp_rank, start=start)
            return
        for at in range(0, out.numel(), _BUFFER):
            part = out[at : at + _BUFFER]
            buffer = torch.empty(part.numel(), dtype=stored)
            whole.read_into(buffer, name, key, tp=tp, rank=tp_rank, start=start + at)
            part.copy_(buffer)

    def fill_all() -> None:
        for i in range(len(state)):
            there = whole.parameter(state.members(i)[0])  # weights of one optimizer group have the same states
            step = whole.numbers.get("step") if there.counted and not weights_only else None
            state.fill(i, read, keys=(MASTER,) if weights_only else tuple(there.keys), step=step)

    everywhere(lambda: check_fits(state, whole, tp=tp, weights_only=weights_only))
    state.before_set()
    try:
        everywhere(fill_all)
    finally:
        whole.close()
    state.after_set()


def check_fits(state: EngineState, whole: WholeCheckpoint, *, tp: int, weights_only: bool) -> None:
    """CheckpointError where a checkpoint lacks a parameter of this rank, or has it with another
    shape, cut or optimizer's states.
    """
    for name, here in state.parameters.items():
        cut, there = Cut(here["dim"], here["blocks"]), whole.parameter(name)
        shape = cut.whole(here["shape"], tp)
        if shape != there.shape or (cut.dim, cut.blocks) != (there.dim, there.blocks):
            raise CheckpointError(
                f"{name} has shape {there.shape} in {whole.folder} and {shape} in this run",
                why="the checkpoint is of another model",
                fix="Set the model section as it was when the checkpoint was saved.",
            )
    for i in range(0 if weights_only else len(state)):
        if problem := state.foreign(i, whole.keys(state.members(i)[0])):
            raise CheckpointError(
                f"{whole.folder} does not fit this run",
                why=problem,
                fix="Use the optimizer that it was saved with, or start from its weights with checkpoint.init_from.",
            )
