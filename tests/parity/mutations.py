"""Faults put into a working engine, to see that the suite notices them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from toolkit.model.init import cut_out, put_together
from toolkit.parallel.groups import Mpu


def drop_sequence_parallel_sum(engine: Any) -> None:
    """Norm gradients keep only this rank's part of the sequence."""
    for flat in engine.flat:
        flat.partial = []


def divide_twice(engine: Any) -> None:
    """Gradients are divided by the number of micro-batches once more; Adam hides it in the losses."""
    finish = engine.finish

    def wrong() -> Any:
        for flat in engine.flat:
            flat.buffer.div_(engine.layout.num_microbatches)
        return finish()

    engine.finish = wrong


def count_replicas_twice(engine: Any) -> None:
    """Every tensor-parallel rank counts the parameters that all of them hold."""
    engine.tp_rank = 0


def adamw_for_muon(engine: Any) -> None:
    """Matrices are updated as other frameworks silently do where they cannot look at whole ones."""
    optimizer = engine.optimizer.optimizer
    members, config = optimizer.members, engine.config.optimizer
    fallback = torch.optim.AdamW([g for g in optimizer.param_groups if g["rule"] == "muon"], lr=config.lr, betas=config.betas)
    fallback.state = optimizer.state
    members["muon"] = fallback


def orthogonalise_pieces(engine: Any) -> None:
    """A data-parallel rank takes its own piece of a matrix that its partition cuts for all there is."""
    muon = engine.optimizer.optimizer.members["muon"]
    muon.ranks = replace(muon.ranks, data=Mpu(alone=True).get_data_parallel_group())


def orthogonalise_shards(engine: Any) -> None:
    """A tensor-parallel rank lets its part of a matrix stand for the others' too."""
    muon = engine.optimizer.optimizer.members["muon"]
    whole, rank, size = muon._whole, engine.tp_rank, engine.layout.tp

    def own_part_only(*arguments: Any) -> Any:
        for part, matrix in whole(*arguments):
            mine = cut_out(part.weight.cut, matrix, tp=size, rank=rank)
            yield part, put_together(part.weight.cut, [mine] * size)

    muon._whole = own_part_only


def forget_tied_sum(engine: Any) -> None:
    """The two copies of a tied embedding see only their own stage's gradient."""
    for flat in engine.flat:
        flat.tied = None
