"""Putting a checkpoint's state back into an engine of the same layout."""

from __future__ import annotations

import json

import torch.distributed as dist
from safetensors import SafetensorError

from toolkit.checkpoint.agree import everywhere
from toolkit.checkpoint.resume import Resume
from toolkit.checkpoint.save import group_file, holder, rank_file
from toolkit.checkpoint.tensors import read_tensors
from toolkit.config.schema import RunConfig
from toolkit.engine.state import EngineState, set_generators
from toolkit.errors import CheckpointError
from toolkit.parallel.layout import Layout


def restore(resume: Resume, state: EngineState, config: RunConfig, layout: Layout) -> None:
    """Weights, moments, counters, loss scale and random generators as they were; all ranks call it, on verified files only.

    Raises CheckpointError on all ranks when any rank's state is cut differently. Nothing is unpickled.
    """
    if resume.path is None:
        return
    folder, rank = resume.path, dist.get_rank()
    source = holder(layout, rank, stage=config.zero.stage)

    def read() -> None:
        groups = len(list(folder.glob(f"rank-{source:05d}.group-*.safetensors")))
        if groups != len(state):
            raise ValueError(f"this run has {len(state)} optimizer groups on rank {rank}, and the checkpoint {groups}")
        for i in range(len(state)):
            tensors, metadata = read_tensors(folder / group_file(source, i))
            state.set(i, tensors, json.loads(metadata["numbers"]))
        tensors, metadata = read_tensors(folder / rank_file(rank))
        state.set_numbers(json.loads(metadata["numbers"]))
        set_generators(tensors)

    def guarded() -> None:
        try:
            read()
        except (ValueError, KeyError, SafetensorError) as e:
            raise CheckpointError(
                f"{folder} does not fit this run",
                why=str(e),
                fix="Set the DeepSpeed JSON's sizes, such as sub_group_size, as they were when it was saved.",
            ) from e

    state.before_set()
    everywhere(guarded)
    state.after_set()
