"""A small run, profiled once as a user would, for the tests of profile and report."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cost.machines import made_up
from toolkit.calibrate.session import write
from toolkit.runfolder.metrics import Metrics, StepRecord

TINY: dict[str, Any] = {
    "model": {
        "family": "llama",
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "max_position_embeddings": 2048,
    },
    "parallel": {"pp": 2},
    "train": {"steps": 6, "global_batch_size": 8, "micro_batch_size": 2, "seq_length": 32, "precision": "fp32"},
    "optimizer": {"lr": 1.0e-3},
    "data": {"workers": 0},
}


@dataclass
class Profiled:
    """folder: of the run; config: its YAML; said: what `toolkit profile` printed; metrics:
    metrics.jsonl as training had left it.
    """

    folder: Path
    config: Path
    said: str
    metrics: str


def toolkit(*arguments: str, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own; stdout holds both streams."""
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "COLUMNS": "120"}
    command = [sys.executable, "-m", "toolkit.cli", *arguments]
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s)


@pytest.fixture(scope="session")
def profiled(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    """Four pipeline micro-batches on two ranks, profiled in a folder that holds a training's metrics."""
    return _profiled(text, tmp_path_factory.getbasetemp() / "profiled")


@functools.cache  # the fixture is imported by tests/report, where pytest takes it for another one
def _profiled(text: Path, folder: Path) -> Profiled:
    folder.mkdir(exist_ok=True)
    run, config = folder / "runs" / "small", folder / "small.yaml"
    data = {**TINY["data"], "source": str(text), "cache_dir": str(folder / "data")}
    config.write_text(yaml.safe_dump({**TINY, "run": {"dir": str(run)}, "data": data}))
    run.mkdir(parents=True, exist_ok=True)
    records = Metrics(run, steps=6, every=100, monitor=None)  # what training writes, without its seconds
    for step in range(1, 7):
        norm, rate = 2.0 + 1.0 / step, 900.0 + 20.0 * step
        records.write(StepRecord(step, 5.0 / step, norm, 1e-3, 256 * step, rate, 0.01, None, 256 / rate, 0.001, 0.4))
    records.close()
    metrics = (run / "metrics.jsonl").read_text()
    write(made_up(), folder / "cpu.yaml")
    done = toolkit("profile", str(config), "--num-procs", "2", "--steps", "2", "--calibration", str(folder / "cpu.yaml"))
    assert done.returncode == 0, done.stdout
    return Profiled(folder=run, config=config, said=done.stdout, metrics=metrics)
