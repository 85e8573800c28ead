"""Putting a checkpoint's state back into an engine of the same layout, or its weights into one of any layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from toolkit.checkpoint.agree import everywhere
from toolkit.checkpoint.resume import Resume
from toolkit.checkpoint.save import group_file, holder, rank_file
from toolkit.checkpoint.tensors import read_tensors
from toolkit.checkpoint.whole import WholeCheckpoint
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


def load_weights(folder: Path, state: EngineState, layout: Layout) -> None:
    """Weights of a checkpoint of any layout into this run's masters, and from there into what forward uses; its optimizer stays fresh.

    All ranks call it, on verified files; each reads its own part alone. Raises CheckpointError on all ranks when any cannot.
    """
    tp_rank = layout.coordinates(dist.get_rank()).tp

    def fill() -> None:
        with WholeCheckpoint(folder) as whole:
            for name, part in state.parameters.items():
                shape = [n * layout.tp if d == part["dim"] else n for d, n in enumerate(part["shape"])]
                if whole.shape(name) != shape:
                    raise CheckpointError(
                        f"{folder} holds {name} with shape {whole.shape(name)}, and this run's is {shape}",
                        fix="Use a checkpoint of the same model.",
                    )

            def read(out: Tensor, name: str, start: int) -> None:
                whole.read_into(out, name, tp=layout.tp, rank=tp_rank, start=start)

            for i in range(len(state)):
                state.set_weights(i, read, whole.dtype)

    state.before_set()
    everywhere(fill)
    state.after_set()
