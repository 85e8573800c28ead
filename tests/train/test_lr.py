"""The learning rate is a function of the step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.config.schema import OptimizerSection
from toolkit.train.lr import learning_rate


def _lrs(**keys: object) -> list[float]:
    optimizer = OptimizerSection(**{"lr": 1.0, **keys})  # type: ignore[arg-type]
    return [learning_rate(optimizer, step=s, total_steps=20) for s in range(20)]


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert _lrs(schedule="constant", warmup_steps=4)[:6] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_cosine_is_half_way_at_half_time() -> None:
    lrs = _lrs(schedule="cosine", min_lr=0.2, decay_steps=10)
    assert lrs[0] == 1.0 and lrs[5] == pytest.approx(0.6) and lrs[10:] == pytest.approx([0.2] * 10)


def test_linear_falls_evenly() -> None:
    assert _lrs(schedule="linear")[:3] == pytest.approx([1.0, 0.95, 0.9])


def test_wsd_holds_and_then_falls() -> None:
    lrs = _lrs(schedule="wsd", decay_steps=4)
    assert lrs[:17] == [1.0] * 17 and lrs[17:] == pytest.approx([0.75, 0.5, 0.25])


def test_wsd_falls_over_the_last_tenth() -> None:
    assert _lrs(schedule="wsd") == [1.0] * 19 + [pytest.approx(0.5)]


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    warmup=st.integers(0, 30),
    decay=st.none() | st.integers(1, 50),
    step=st.integers(0, 60),
    total=st.integers(1, 50),
)
def test_never_leaves_its_bounds(schedule: str, warmup: int, decay: int | None, step: int, total: int) -> None:
    optimizer = OptimizerSection(lr=0.5, min_lr=0.1, schedule=schedule, warmup_steps=warmup, decay_steps=decay)  # type: ignore[arg-type]
    lr = learning_rate(optimizer, step=step, total_steps=total)
    assert math.isfinite(lr) and 0 < lr <= 0.5 and (step < warmup or lr >= 0.1 - 1e-12)
