"""How long a run says that it still takes."""

from __future__ import annotations

import pytest

from toolkit.runfolder.metrics import StepRecord, step_line
from toolkit.runfolder.pace import Pace, hours


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_first_step_and_a_slow_one_do_not_count() -> None:
    clock = Clock()
    pace = Pace(clock=clock)
    for seconds in (300.0, 2.0, 2.0, 90.0, 2.0, 2.0):  # the first compiles, and once a disk was slow
        clock.now += seconds
        pace.add(step_s=seconds, tokens_per_s=1.0 / seconds)
    assert pace.left_s(100) == pytest.approx(200.0)


def test_evaluation_and_saving_count() -> None:
    clock = Clock()
    pace = Pace(clock=clock)
    for step in range(21):
        clock.now += 2.0 + (10.0 if step % 10 == 0 and step else 0.0)  # every tenth step is evaluated
        pace.add(step_s=2.0, tokens_per_s=1.0)
    assert pace.left_s(50) == pytest.approx(50 * (2.0 + 1.0))


def test_the_speed_of_now_counts_not_that_of_the_start() -> None:
    clock = Clock()
    pace = Pace(clock=clock)
    for seconds in [1.0] * 100 + [3.0] * 60:
        clock.now += seconds
        pace.add(step_s=seconds, tokens_per_s=1.0)
    assert pace.left_s(10) == pytest.approx(30.0)


def test_nothing_is_said_before_the_second_step() -> None:
    pace = Pace()
    assert pace.left_s(10) is None and pace.tokens_per_s() is None
    pace.add(step_s=1.0, tokens_per_s=1.0)
    assert pace.left_s(10) is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(7.6, "8 s"), (59.0, "59 s"), (60, "1 min"), (59.6 * 60, "1 h 00 min"), (3900, "1 h 05 min"), (200_000, "55 h 33 min")],
)
def test_times_are_said_in_hours_and_minutes(seconds: float, said: str) -> None:
    assert hours(seconds) == said


def test_the_step_line_has_the_time_left_and_the_last_one_none() -> None:
    record = StepRecord(
        step=7,
        loss=1.5,
        grad_norm=1.0,
        lr=1e-3,
        tokens=7,
        tokens_per_s=1.0,
        tflops_per_gpu=1.0,
        mfu=None,
        step_s=1.0,
        data_wait_s=0.0,
        memory_gib=1.0,
    )
    assert step_line(record, steps=900, left_s=3900.0).endswith("1.00 GiB | ETA 1 h 05 min")
    assert "ETA" not in step_line(record, steps=900)
