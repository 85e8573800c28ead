"""The checkpoint bench measures what it says, on a state of a few MiB. No timing is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.checkpoints import GIB, STEPS, bytes_of, large, model_of, saves, weights
from tests.checkpoint.synthetic import state_bytes
from tests.pool import Pool
from toolkit.checkpoint.whole import WholeCheckpoint


@pytest.mark.parametrize("gib", [0.05, 1.0, 3.0, 17.0])
def test_the_model_has_the_size_that_is_asked_for(gib: float) -> None:
    assert state_bytes(model_of(gib))[0] / GIB == pytest.approx(gib, rel=0.15)


def test_saves_of_a_real_engine(pool: Pool, tmp_path: Path) -> None:
    model = model_of(0.004)
    found = saves(pool, tmp_path / "run", model, asynchronous=True, deepspeed=tmp_path / "deepspeed")
    assert len(found["pause"]) == len(found["write"]) == STEPS and len(found["deepspeed"]) == 1
    assert min(*found["pause"], *found["write"]) > 0
    states = state_bytes(model)[0]
    source = tmp_path / f"run/checkpoints/step-{STEPS:08d}"
    for folder in (source, tmp_path / "deepspeed"):
        assert 0.9 < bytes_of(folder) / states < 1.5, "both hold weights and both moments, and little else"
    weights(source, tmp_path / "weights")
    with WholeCheckpoint(tmp_path / "weights") as whole, WholeCheckpoint(source) as saved:
        assert all(bool((whole.read(name) == saved.read(name)).all()) for name in saved.names)


def test_a_large_one_is_resharded(tmp_path: Path) -> None:
    (line,) = large(tmp_path, 0.02)
    assert "DP=2 x ZeRO-1 to TP=2 x PP=2 x ZeRO-2" in line and {p.name for p in tmp_path.iterdir()} == {"large", "larger"}
