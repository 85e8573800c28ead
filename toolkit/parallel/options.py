"""Settings near a given one: the candidates from which a broken rule's suggestion is taken, nearest first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from toolkit.config.schema import LARGEST_INT
from toolkit.parallel.case import Case
from toolkit.parallel.layout import split_layers

Option = dict[str, Any]


@lru_cache(maxsize=256)
def chunk_counts(layers: int) -> tuple[int, ...]:
    """Every number of pipeline chunks (pp x vpp) that so many layers can be split into, ascending."""
    counts = {count for saved in (0, 1, 2) for count in divisors(layers + saved) if split_layers(layers, count)}
    return tuple(sorted(counts))


def choices(*options: Option) -> Iterator[Option]:
    """The given options, in that order."""
    return iter(options)


@lru_cache(maxsize=256)
def divisors(number: int) -> tuple[int, ...]:
    """Every divisor of a number of up to 31 bits, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return (*small, *(number // d for d in reversed(small) if d * d != number))


def nearest_first(values: Iterable[int], *, to: int) -> list[int]:
    """Values by their ratio to a number: of 1, 2, 4 and 8, the nearest to 3 is 4."""
    return sorted(set(values), key=lambda v: (abs(math.log(v / to)), v))


def divisors_near(case: Case, key: str, number: int) -> Iterator[Option]:
    """The divisors of a number for one key; a tensor degree of 1 also switches sequence parallelism off."""
    now = case.groups if key == "model.num_query_groups" else case.tp
    for value in nearest_first(divisors(number), to=now):
        yield {key: value}
    if case.sp and key == "parallel.tp":
        yield {key: 1, "parallel.sequence_parallel": False}


def degrees(case: Case) -> Iterator[Option]:
    """One other tensor, pipeline or context degree for the same processes."""
    keys = (("parallel.tp", case.tp), ("parallel.pp", case.pp), ("parallel.cp", case.cp))
    single = [(abs(math.log(value / now)), key, value) for key, now in keys for value in divisors(case.world)]
    yield from ({key: value} for _, key, value in sorted(single))


def layouts(case: Case) -> Iterator[Option]:
    """Whole layouts for the same processes and model, with a global batch that fits: for when no
    single key mends a rule.
    """
    ranked: list[tuple[float, int, Option]] = []
    for tp in divisors(math.gcd(case.world, case.heads, case.groups, case.ffn, case.vocab)):
        for pp in divisors(case.world // tp):
            for cp in {1, case.cp} if case.world // tp // pp % case.cp == 0 else {1}:
                step = case.micro * (case.world // (tp * pp * cp))
                for vpp in {1, case.vpp if pp > 1 else 1}:
                    if split_layers(case.layers, pp * vpp) is None:
                        continue
                    unit = step * (pp if vpp > 1 else 1)
                    batch = max(1, min(round(case.batch / unit), LARGEST_INT // unit)) * unit
                    sp = case.sp and tp > 1 and case.seq % (tp * cp) == 0
                    distance = sum(abs(math.log(new / old)) for new, old in _pairs(case, tp, pp, cp, vpp, batch)) + (sp != case.sp)
                    wanted = {"tp": tp, "pp": pp, "cp": cp, "vpp": vpp, "sequence_parallel": sp}
                    current = {"tp": case.tp, "pp": case.pp, "cp": case.cp, "vpp": case.vpp, "sequence_parallel": case.sp}
                    option: Option = {f"parallel.{key}": value for key, value in wanted.items() if value != current[key]}
                    if batch != case.batch:
                        option["train.global_batch_size"] = batch
                    if option and batch <= LARGEST_INT:
                        ranked.append((distance, len(ranked), option))
    yield from (option for _, _, option in sorted(ranked))


def _pairs(case: Case, tp: int, pp: int, cp: int, vpp: int, batch: int) -> tuple[tuple[int, int], ...]:
    return (tp, case.tp), (pp, case.pp), (cp, case.cp), (vpp, case.vpp), (batch, case.batch)


def splits(case: Case) -> Iterator[Option]:
    """Other pipeline degrees and chunk counts that split the layers."""
    fits = chunk_counts(case.layers)
    single = [(abs(math.log(value / case.vpp)), "parallel.vpp", value) for value in fits]
    single += [(abs(math.log(value / case.pp)), "parallel.pp", value) for value in fits]
    yield from ({key: value} for _, key, value in sorted(single))
    for pp in nearest_first(fits, to=case.pp):
        yield {"parallel.pp": pp, "parallel.vpp": 1}


def batches(case: Case, *, micro_too: bool) -> Iterator[Option]:
    """Global batches in whole micro-batches on every rank, then other micro-batches, then no interleaving."""
    step = case.micro * case.dp
    sizes: set[int] = set()
    for unit in {step, step * case.pp, step * max(1, case.accumulation)}:
        below = case.batch // unit * unit
        sizes |= {value for value in (below, below + unit) if 1 <= value <= LARGEST_INT}
    for value in nearest_first(sizes, to=case.batch):
        yield {"train.global_batch_size": value}
    if micro_too and case.batch % case.dp == 0:
        for value in nearest_first(divisors(case.batch // case.dp), to=case.micro):
            yield {"train.micro_batch_size": value}
    if not micro_too:
        yield {"parallel.vpp": 1}
    yield {"train.micro_batch_size": 1, "train.global_batch_size": case.dp * case.pp}


def micro_batches(case: Case) -> Iterator[Option]:
    """The micro-batch, else the global batch, that an explicit number of micro-batches leads to."""
    micro, rest = divmod(case.batch, case.accumulation * case.dp)
    if rest == 0:
        yield {"train.micro_batch_size": micro}
    if (batch := case.accumulation * case.micro * case.dp) <= LARGEST_INT:
        yield {"train.global_batch_size": batch}
    yield {"zero.deepspeed.gradient_accumulation_steps": "auto"}


def sequences(case: Case) -> Iterator[Option]:
    """Sequence lengths that every rank can take an equal part of, within the positions; then more
    positions or fewer ranks.
    """
    unit = math.lcm(case.tp * case.cp if case.sp else 1, 2 * case.cp if case.cp > 1 else 1)
    longest = min(case.seq + unit, case.positions) // unit * unit
    values = {case.seq // unit * unit, (case.seq // unit + 1) * unit, longest}
    for value in nearest_first((v for v in values if 1 <= v <= LARGEST_INT), to=case.seq):
        yield {"train.seq_length": value}
    if case.seq > case.positions:
        yield {"model.max_position_embeddings": case.seq}
    if case.sp:
        yield {"parallel.sequence_parallel": False}
    yield {"parallel.cp": 1}


def warm_ups(case: Case) -> Iterator[Option]:
    """Shorter warm-ups, decays that fit beside them, or a longer run."""
    if case.decay:
        room = case.steps - case.warmup if case.schedule == "wsd" else 0
        if room > 0:
            yield {"optimizer.decay_steps": room}
        yield {"optimizer.decay_steps": None}
    decay = (case.decay or max(1, case.steps // 10)) if case.schedule == "wsd" else 0
    if case.schedule in ("linear", "cosine") and case.decay:
        yield {"optimizer.warmup_steps": min(case.decay - 1, case.steps)}
    if case.steps >= decay:
        yield {"optimizer.warmup_steps": min(case.warmup, case.steps - decay)}
    yield {"optimizer.warmup_steps": min(case.warmup, case.steps)}
    yield {"optimizer.warmup_steps": 0, "optimizer.decay_steps": None}
