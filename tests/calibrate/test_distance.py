"""How far cores are from each other: the measurement, and figures kept by it."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cost.machines import made_up
from toolkit.calibrate import distance, session
from toolkit.calibrate.modes import WIDER, wider
from toolkit.cost.cpu_step import cpu_step_time
from toolkit.cost.workload import Workload
from toolkit.hardware.catalogue import parse_hardware


def test_a_hand_over_is_measured_and_the_process_keeps_its_cores() -> None:
    cores = os.sched_getaffinity(0)
    end, seconds = time.monotonic() + 120, 0.0
    while not seconds and len(cores) > 1 and time.monotonic() < end:  # 0.0: the cores had other work throughout
        seconds = distance.handover_seconds()
        assert os.sched_getaffinity(0) == cores
    assert 0.0 < seconds < 0.1 or len(cores) < 2


def test_figures_taken_while_the_cores_were_moved_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near, moved in between, far, and far again: two sets of figures, each measured once."""
    near, far = 2e-7, 4e-7
    seen = iter([near, near, near, far, far, far, far, near, near])
    monkeypatch.setattr(distance, "handover_seconds", lambda: next(seen))
    taken: list[Any] = []
    kept = distance.Distances(["a"])
    for number in range(5):
        kept.take("a" if number != 1 else "moved", lambda number=number: taken.append(number) or number)
    assert taken == [0, 1, 2]
    assert kept.complete(lambda: pytest.fail("nothing lacks")) == [(near, {"a": 0}), (far, {"a": 2})]


def test_what_was_never_taken_whole_is_tried_again_and_then_an_error() -> None:
    tried: list[int] = []
    with pytest.raises(TimeoutError, match="moved"):
        distance.Distances(["a"]).complete(lambda: tried.append(1))
    assert len(tried) == distance.ATTEMPTS


def test_a_step_lies_between_the_distances_unless_it_is_known() -> None:
    slow = made_up(slower=2.0)
    near, far = replace(made_up().settings[1], handover_s=2e-7), replace(slow.settings[1], handover_s=4e-7)
    machine = replace(made_up(), settings=(made_up().settings[0], near, far))
    w = Workload.of(wider("llama", 128, folder=Path("runs")), 1)

    def step(handover_s: float = 0.0) -> float:
        return cpu_step_time(w, replace(parse_hardware("cpu:1"), cpu=machine, threads=2), handover_s=handover_s).step

    assert step(2.1e-7) < step() < step(3.9e-7)
    assert step() == pytest.approx((step(2e-7) + step(4e-7)) / 2)


def test_what_is_handed_on_is_found_behind_runs() -> None:
    """Runs of a machine on which each element handed on takes 0.3 ns give back 0.3 ns, for the setting that took them alone."""
    machine = made_up()
    team = replace(machine.settings[1], handed_s=3e-10)
    hardware = replace(parse_hardware("cpu:1"), threads=2, cpu=replace(machine, settings=(team,)))
    steps = [cpu_step_time(Workload.of(wider(family, width, folder=Path("runs")), 1), hardware).step for family, width in WIDER]
    found = session.with_steps(machine, [None, steps, None])
    assert [s.handed_s for s in found.settings] == [0.0, pytest.approx(3e-10), 0.0]
