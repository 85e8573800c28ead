"""A tiny run for the ways to start one, and what each must come to: the metrics of a single process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

STEPS = 3
CONFIG: dict[str, dict[str, Any]] = {
    "model": {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "max_position_embeddings": 32,
    },
    "zero": {"stage": 2},
    "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1, "seq_length": 32, "precision": "fp32"},
    "data": {"tokenizer": "bytes", "workers": 0},
}


def write_config(folder: Path) -> Path:
    """The run's YAML, with a text to train on."""
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}, and a line follows a line.\n" for i in range(4000)))
    data = {**CONFIG["data"], "source": str(folder / "text.txt"), "cache_dir": str(folder / "data")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**CONFIG, "data": data, "run": {"dir": str(folder / "reference"), "seed": 7}}))
    return folder / "tiny.yaml"


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(found: list[dict[str, float]], reference: list[dict[str, float]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in reference] and len(found) == STEPS
    for line, expected in zip(found, reference, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
