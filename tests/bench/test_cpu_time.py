"""The page of times on a CPU: its configurations, and what a table says of measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.cpu_time import CASES, PARTS, TRIED, predicted, rows, table
from tests.cost.machines import made_up
from toolkit.cost.cpu_step import SHARED
from toolkit.cost.step import PARTS as ALL_PARTS
from toolkit.hardware.catalogue import parse_hardware
from toolkit.parallel import rules


@pytest.mark.parametrize("case", [*CASES, *TRIED], ids=lambda case: case.name)
def test_every_configuration_can_be_trained(case) -> None:  # type: ignore[no-untyped-def]
    machine = parse_hardware(f"cpu:{case.ranks}").machine
    assert rules.violations(case.config(Path("runs")), case.ranks, machine=machine) == []


def test_there_are_thirty_and_none_was_tried_before() -> None:
    assert len(CASES) == len(set(CASES)) == 30
    assert not set(CASES) & set(TRIED)


def test_the_parts_of_an_estimate_are_all_told() -> None:
    assert sorted(name for names in PARTS.values() for name in names) == sorted([*ALL_PARTS, SHARED])
    step, parts = predicted(CASES[0], made_up())
    assert sum(parts.values()) == pytest.approx(step)


def test_a_table_counts_what_is_near_and_names_what_is_off() -> None:
    records = []
    for i, factor in ((0, 1.0), (1, 1.1), (2, 2.0)):
        step, parts = predicted(CASES[i], made_up())
        measured = parts | {"optimizer": parts["optimizer"] + (factor - 1) * step, "forward": 0.0, "backward": 0.0}
        records += [
            {"case": i, "handover_s": 1e-7, "step": factor * step, "times": [factor * step] * 4, "parts": measured} for _ in range(2)
        ]
    found = rows(CASES, records, made_up())
    assert [round(r["error"], 3) for r in found] == [0, -0.091, -0.5]
    text = table(found, made_up(), machine="here")
    assert "**2 of 3 within 15 %**; median error 9.1%, largest 50%" in " ".join(text.split())
    assert f"- {CASES[2].name}: -50%; optimizer" in " ".join(text.split())
