"""A Trainer on the pool's ranks, with parts that the tests name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool
from tests.trainer.parts import IDS, SEQ

MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48, "vocab_size": IDS}


class Fitted:
    """Fits Trainers in a folder of the test's own."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool, self.folder = pool, folder

    def config(self, name: str = "run", /, **sections: dict[str, Any]) -> dict[str, Any]:
        """A small run of 4 steps of 4 samples; sections replace its keys."""
        config: dict[str, Any] = {
            "run": {"dir": str(self.folder / name)},
            "model": MODEL,
            "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 1, "seq_length": SEQ, "precision": "fp32"},
            "optimizer": {"lr": 1.0e-2, "schedule": "constant"},
            "data": {"workers": 0},
        }
        config = copy.deepcopy(config)
        for key, section in sections.items():
            config.setdefault(key, {}).update(section)
        return config

    def __call__(self, *runs: dict[str, Any], ranks: int = 2) -> list[dict[str, Any]]:
        """What each rank found, in a world of its own: a rank that waits for ever fails the test."""
        return self.pool.run("tests.trainer.run:attempt", ranks, {"runs": list(runs)}, deadline_s=120)

    def error(self, **run: Any) -> str:
        """The one message with which all ranks end."""
        ranks = self({"config": self.config(), "dataset": ["Numbers"], **run})
        errors = {rank["errors"][0] for rank in ranks}
        assert len(errors) == 1, errors
        (error,) = errors
        assert error is not None and "Traceback" not in error and "\n" not in error
        return error

    def metrics(self, run: str = "run") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]

    def losses(self, run: str = "run") -> list[float]:
        return [record["loss"] for record in self.metrics(run)]


@pytest.fixture
def fitted(pool: Pool, tmp_path: Path) -> Fitted:
    return Fitted(pool, tmp_path)


@pytest.fixture
def fitted_config(fitted: Fitted) -> dict[str, Any]:
    return fitted.config()
