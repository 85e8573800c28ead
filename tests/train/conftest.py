"""A tiny run on text that the tests make, started as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

TINY: dict[str, Any] = {
    "model": {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "max_position_embeddings": 64,
    },
    "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 1, "seq_length": 32, "precision": "fp32"},
    "optimizer": {"lr": 1.0e-3},
    "data": {"workers": 1},
}


@dataclass
class Done:
    """How a started program ended."""

    code: int
    output: str


def kill(process: subprocess.Popen[str]) -> None:
    """End a program and its ranks, which have sessions of their own."""
    if process.poll() is None:
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()


@dataclass
class Started:
    """Starts toolkit programs in a folder of their own."""

    folder: Path
    config: Path

    def command(self, *arguments: str, procs: int = 1) -> list[str]:
        return [sys.executable, "-m", "toolkit.cli", "train", str(self.config), *arguments, "--num-procs", str(procs)]

    def train(self, *arguments: str, procs: int = 1, timeout_s: float = 900.0) -> Done:
        return self.run(self.command(*arguments, procs=procs), timeout_s=timeout_s)

    def ranks(self, *arguments: str, ranks: int = 1) -> Done:
        """The same ranks without command and launcher, forked from a process that has loaded torch."""
        from tests.checkpoint.runs import Run

        run = Run(self.config, *arguments, "data.workers=0", ranks=ranks)  # a daemon may have no readers of its own
        return Done(run.wait(), run.text())

    def run(self, command: list[str], *, timeout_s: float = 900.0, cwd: Path | None = None) -> Done:
        """Run to the end; a program that does not end in time fails the test with its output."""
        process = self.start(command, cwd=cwd)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            kill(process)
            pytest.fail(f"did not end within {timeout_s} s:\n{process.communicate()[0]}")
        return Done(process.returncode, output)

    def start(self, command: list[str], *, cwd: Path | None = None) -> subprocess.Popen[str]:
        path = f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=cwd or self.folder
        )

    def metrics(self, run: str = "run") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def shared(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Started:
    """One folder for all tests, so that the data is prepared once."""
    folder = tmp_path_factory.mktemp("train")
    config = folder / "tiny.yaml"
    raw = {
        **TINY,
        "run": {"dir": str(folder / "runs" / "run")},
        "data": {**TINY["data"], "source": str(text), "cache_dir": str(folder / "data")},
    }
    config.write_text(yaml.safe_dump(raw))
    return Started(folder, config)
