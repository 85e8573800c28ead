"""Restore a checkpoint into an engine: as it was where each rank finds its own part, else resharded
on the fly.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from toolkit.checkpoint.identity import layout_of, same_degrees
from toolkit.checkpoint.move import fill
from toolkit.checkpoint.names import group_file, holder, rank_file
from toolkit.checkpoint.resume import Resume
from toolkit.checkpoint.whole import WholeCheckpoint
from toolkit.config.schema import RunConfig
from toolkit.engine.state import EngineState, set_generators
from toolkit.errors import CheckpointError
from toolkit.parallel.agree import everywhere
from toolkit.parallel.groups import seed_generators
from toolkit.parallel.layout import Layout
from toolkit.tensors import read_metadata, read_tensors

T = TypeVar("T")

log = logging.getLogger("toolkit.train")


def restore(resume: Resume, state: EngineState, config: RunConfig, layout: Layout) -> None:
    """Weights, moments, counters, loss scale and random generators; all ranks call it, on verified
    files only.

    On the layout that saved them each rank reads its own files, and the run goes on bit for bit. On
    any other each rank reads its parts of the whole tensors, and where TP, PP, VPP or DP differ,
    dropout draws from generators seeded anew by (run.seed, step, place). Raises CheckpointError on
    all ranks. Nothing is unpickled.
    """
    if resume.path is None or resume.manifest is None:
        return
    folder, rank = resume.path, dist.get_rank()
    here, there = layout_of(config, layout), resume.manifest.layout
    source = holder(layout, rank, stage=config.zero.stage)
    if all(everywhere(lambda: here == there and _guarded(folder, lambda: _cut_alike(state, folder, source)))):
        state.before_set()
        everywhere(lambda: _guarded(folder, lambda: _read_own(state, folder, source)))
        state.after_set()
    else:
        if here == there and rank == 0:
            log.info("its optimizer groups are cut in another way than this run's: resharding on the fly")
        opened: list[WholeCheckpoint] = []
        everywhere(lambda: opened.append(WholeCheckpoint(folder)))
        fill(state, opened[0], tp=layout.tp, tp_rank=layout.coordinates(rank).tp)
        state.set_numbers(opened[0].numbers, same_precision=here["train.precision"] == there["train.precision"])
    # a checkpoint that was resharded offline may hold no generator states
    if not all(everywhere(lambda: same_degrees(here, there) and _guarded(folder, lambda: _read_generators(folder, rank)))):
        digest = hashlib.sha256(f"{config.run.seed}:{resume.step}".encode()).digest()
        seed_generators(layout.coordinates(rank), seed=int.from_bytes(digest[:4], "little"))
        if config.model.dropout > 0 and rank == 0:
            log.info("dropout's generators are seeded anew from run.seed and step %d, since its masks depend on the layout", resume.step)


def _cut_alike(state: EngineState, folder: Path, source: int) -> bool:
    """Whether a rank's files hold exactly the fragments that this rank's partitions have."""
    if len(list(folder.glob(f"rank-{source:05d}.group-*.safetensors"))) != len(state):
        return False
    there = (json.loads(read_metadata(folder / group_file(source, i))["fragments"]) for i in range(len(state)))
    return all([list(astuple(f)) for f in state.fragments(i)] == found for i, found in enumerate(there))


def _read_own(state: EngineState, folder: Path, source: int) -> None:
    for i in range(len(state)):
        tensors, metadata = read_tensors(folder / group_file(source, i))
        state.set(i, tensors, json.loads(metadata["numbers"]))
    state.set_numbers(json.loads(read_metadata(folder / rank_file(dist.get_rank()))["numbers"]))


def _read_generators(folder: Path, rank: int) -> bool:
    states, _ = read_tensors(folder / rank_file(rank))
    if states:
        set_generators(states)
    return bool(states)


def _guarded(folder: Path, action: Callable[[], T]) -> T:
    try:
        return action()
    except (ValueError, KeyError, SafetensorError) as e:
        raise CheckpointError(f"{folder} does not fit this run", why=str(e), fix="Use the versions that it was saved with.") from e


def load_weights(folder: Path, state: EngineState, layout: Layout) -> None:
    """Weights of a verified checkpoint of any layout, and nothing else of it; all ranks call it and
    read their own parts alone.
    """
    opened: list[WholeCheckpoint] = []
    everywhere(lambda: opened.append(WholeCheckpoint(folder)))
    fill(state, opened[0], tp=layout.tp, tp_rank=layout.coordinates(dist.get_rank()).tp, weights_only=True)
