"""Faults put into a working engine, to see that the suite notices them."""

from __future__ import annotations

from typing import Any


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


def forget_tied_sum(engine: Any) -> None:
    """The two copies of a tied embedding see only their own stage's gradient."""
    for flat in engine.flat:
        flat.tied = None
