"""Widths of intervals from errors on sources left out: split-conformal by kind of software and layout.

Each error is of a row whose source no constant, scalar or width was fitted to. A class's width is the 80 % quantile of the sizes of
its errors, in which each source counts once; few sources pull it towards the class around it.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np

from toolkit.cost import spread
from toolkit.cost.memory import estimate
from toolkit.cost.workload import Workload
from toolkit.hardware.catalogue import parse_hardware

FILE = Path(spread.__file__).with_name("spreads.py")
SHARE = 0.8
FLOOR = 0.05  # a rehearsal is not a run: what a GPU does otherwise is at least so much
FEW = 8  # rehearsals that a class of our own engine needs
FULL = 4 * 2**30  # bytes; a rehearsal that reserves less says little of full devices
PULL = 1.0  # sources that the class around counts as
Table = dict[str, dict[str, tuple[float, float]]]


@dataclass(frozen=True, kw_only=True)
class Error:
    """One row's error: which figure, its source and classes (narrowest first), log(truth/estimate), and how many settings are unknown."""

    part: str
    source: str
    traits: tuple[str, ...]
    value: float
    unknown: int


def widths(errors: Sequence[Error], *, without: str | None = None) -> Table:
    """Low and high end by figure and class; symmetric, but for our own engine's, of which there are many."""
    table: Table = {}
    for part in ("time", "memory"):
        by_class: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        around: dict[str, str] = {}
        for e in errors:
            if e.part != part or e.source == without:
                continue
            scaled = e.value / (1 + spread.UNKNOWN * min(e.unknown, 6))
            for name, outer in zip(e.traits, (*e.traits[1:], ""), strict=True):
                if not name.startswith("toolkit") or e.source == "rehearsals":
                    by_class[name][e.source].append(scaled)
                    around[name] = outer
        by_class["all"].pop("rehearsals", None)
        for name in [n for n, found in by_class.items() if n.startswith("toolkit,") and sum(map(len, found.values())) < FEW]:
            del by_class[name]  # the class around it stands in
        table[part] = {}
        count = max(1, len({e.source for e in errors if e.source not in (without, "rehearsals")}))
        share = min(1.0, SHARE * (count + 1) / count)  # what holds SHARE of one more source that is exchangeable with these
        for name in sorted(by_class, key=lambda n: _depth(n, around)):  # the class around it first
            sources = by_class[name]
            if name.startswith("toolkit"):  # one source, and many rows of it
                values = sorted(v for found in sources.values() for v in found)
                ends = [float(np.quantile(values, (1 + sign * SHARE) / 2)) for sign in (-1, 1)]
                table[part][name] = (round(min(ends[0], -FLOOR), 4), round(max(ends[1], FLOOR), 4))
                continue
            if not sources:
                continue
            width = _quantile(sources, share)
            if (wider := table[part].get(around[name])) is not None:
                width = (width * len(sources) + wider[1] * PULL) / (len(sources) + PULL)
            table[part][name] = (round(-width, 4), round(width, 4))
    return table


def _depth(name: str, around: Mapping[str, str]) -> int:
    depth = 0
    while around.get(name):
        name, depth = around[name], depth + 1
    return depth


def _quantile(sources: Mapping[str, Sequence[float]], share: float) -> float:
    """The quantile of sizes at share, each source weighing the same."""
    pairs = sorted((abs(v), 1 / len(found)) for found in sources.values() for v in found)
    total, seen = sum(weight for _, weight in pairs), 0.0
    for value, weight in pairs:
        seen += weight
        if seen >= share * total - 1e-9:
            return value
    return pairs[-1][0]


def rehearsed(path: Path, validate: Callable[..., object]) -> list[Error]:
    """Errors of our own engine's memory: what rehearsals would reserve over the estimate. validate: a raw config to a RunConfig."""
    if not path.is_file():
        return []
    found = []
    for name, seen in json.loads(path.read_text(encoding="utf-8")).items():
        if seen.get("reserved", 0) < FULL:  # or one that ended with an error
            continue
        config = validate(seen["raw"])
        p, copies = config.parallel, re.search(r"\bdp(\d+)", name)  # type: ignore[attr-defined]
        world = p.tp * p.pp * p.cp * (int(copies[1]) if copies else 1)
        w = Workload.of(config, world)  # type: ignore[arg-type]
        hardware = parse_hardware(f"h100-80gb:8x{-(-world // 8)}")
        stage = estimate(w, hardware, only=int(name.rsplit(" ", 1)[1])).stages[0]
        value = log(seen["reserved"] / stage.reserved)
        found.append(Error(part="memory", source="rehearsals", traits=spread.traits(w), value=value, unknown=0))
    return found


def comparison(pairs: Sequence[tuple[str, float]]) -> float:
    """By how much comparisons of two plans of one model and machine are off: the median over sources of the median size.

    pairs: a source, and the difference of two of its rows' errors.
    """
    by_source: dict[str, list[float]] = defaultdict(list)
    for source, value in pairs:
        by_source[source].append(abs(value))
    return round(float(np.median([np.median(values) for values in by_source.values()])), 4) if by_source else 0.04


def write(table: Table, between: float, *, path: Path = FILE) -> None:
    """Store widths as the module that toolkit.cost.spread reads."""
    lines = ['"""Written by `python -m tests.bench.planner --fit`; do not edit. What it means: toolkit/cost/spread.py."""', ""]
    lines += ["SPREADS: dict[str, dict[str, tuple[float, float]]] = {"]
    for part, classes in table.items():
        lines += [f'    "{part}": {{', *(f'        "{name}": {ends!r},' for name, ends in sorted(classes.items())), "    },"]
    path.write_text("\n".join([*lines, "}", f"COMPARISON = {between!r}", ""]), encoding="utf-8")
