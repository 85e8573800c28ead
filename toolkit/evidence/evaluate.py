"""Predictions of published rows for a score: with everything fitted to them, and with each source left out of every fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

from toolkit.cost import constants, spread
from toolkit.evidence import conform, measures
from toolkit.evidence.fitter import Fit, Fitter, usable
from toolkit.evidence.published import predict, read_row, unknown_settings

Rows = Sequence[Mapping[str, Any]]


@dataclass(kw_only=True)
class Evaluation:
    """Rows with their answers when their source was left out of constants, scalars and widths, and what all rows together give."""

    rows: Rows
    held_out: list[dict[str, Any]]
    fit: Fit
    left_out: dict[str, Fit]
    widths: conform.Table
    comparison: float

    @property
    def fitted(self) -> list[dict[str, Any]]:
        """The same rows with everything fitted to them."""
        with constants.changed(**self.fit.constants), spread.using(self.widths):
            return [predict(row, scales=self.fit.scales) for row in self.rows]


def evaluate(rows: Rows, *, rehearsals: Path | None = None, validate: Callable[..., object] | None = None) -> Evaluation:
    """Fit to all rows and to all sources but one; rehearsals: of this project's own engine, for its widths.

    Widths of a source's intervals come from the errors of the others, each of a fit without it.
    """
    fitter = Fitter(usable(rows))
    whole = fitter.fit()
    by_source: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_source[str(row.get("source_id"))].append(index)
    fits = {source: fitter.fit(without=source) for source in by_source}
    answers: list[dict[str, Any]] = [{} for _ in rows]
    for source, indices in by_source.items():
        with constants.changed(**fits[source].constants):
            for index in indices:
                answers[index] = predict(rows[index], scales=fits[source].scales)
    errors = errors_of(rows, answers)
    own = conform.rehearsed(rehearsals, validate) if rehearsals and validate else []
    for source, indices in by_source.items():
        with constants.changed(**fits[source].constants), spread.using(conform.widths([*errors, *own], without=source)):
            for index in indices:
                answers[index] = predict(rows[index], scales=fits[source].scales)
    return Evaluation(
        rows=rows,
        held_out=answers,
        fit=whole,
        left_out=fits,
        widths=conform.widths([*errors, *own]),
        comparison=conform.comparison(_pairs(rows, answers)),
    )


def errors_of(rows: Rows, answers: Sequence[Mapping[str, Any]]) -> list[conform.Error]:
    """log(truth/estimate) of every scored figure."""
    found = []
    for row, answer in zip(rows, answers, strict=True):
        if not measures.scored(row) or answer.get("unsupported"):
            continue
        workload, _ = read_row(row)
        peak, truths = measures.true_peak(row), []
        if rate := measures.true_rate(row):
            truths.append(("time", rate, "tokens_per_s_per_gpu"))
        if peak:
            truths.append(("memory", *peak))
        found += [
            conform.Error(
                part=part,
                source=str(row["source_id"]),
                traits=spread.traits(workload),
                value=log(truth / answer[field]),
                unknown=unknown_settings(row),
            )
            for part, truth, field in truths
        ]
    return found


def _pairs(rows: Rows, answers: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Differences of errors of rows that a ranking compares, next to each other in measured throughput."""
    groups: dict[tuple[Any, ...], list[tuple[float, float]]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        rate = measures.true_rate(row) if measures.scored(row) and not answer.get("unsupported") else None
        if rate:
            groups[measures.group_of(row)].append((rate, log(answer["tokens_per_s_per_gpu"] / rate)))
    return [
        (str(group[0]), one[1] - other[1])
        for group, items in groups.items()
        if len(items) >= measures.GROUP_MIN
        for one, other in pairwise(sorted(items))
    ]
