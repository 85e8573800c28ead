"""`toolkit train` as a user runs it: real launcher, real data, real files."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.train.conftest import Started, kill

KEYS = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "tflops_per_gpu", "mfu", "step_s", "data_wait_s", "memory_gib"}


def _run_dir(shared: Started, name: str) -> str:
    return f"run.dir={shared.folder / 'runs' / name}"


def test_layouts_give_the_same_losses_on_real_data(shared: Started) -> None:
    one = shared.ranks(_run_dir(shared, "one"), "zero.stage=0", "train.eval_every=2", "train.eval_steps=1")
    assert one.code == 0, one.output
    two = shared.ranks(_run_dir(shared, "two"), "zero.stage=2", "parallel.pp=2", "train.eval_every=2", "train.eval_steps=1", ranks=2)
    assert two.code == 0, two.output
    assert "step 4/4" in two.output and "eval loss" in two.output
    for a, b in zip(shared.metrics("one"), shared.metrics("two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a.get("eval_loss", 0.0) == pytest.approx(b.get("eval_loss", 0.0), rel=1e-5)
    assert ["eval_loss" in r for r in shared.metrics("one")] == [False, True, False, True]


def test_run_folder_holds_what_ran(shared: Started) -> None:
    done = shared.train(_run_dir(shared, "files"), "log.tensorboard=true", "log.csv=true", "train.steps=2")
    assert done.code == 0, done.output
    assert done.output.count("train: ") == 1, "the ranks say again what the command has said"
    folder = shared.folder / "runs" / "files"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["vocab_size"] == 257 and config["train"]["steps"] == 2
    assert json.loads((folder / "ds_config.json").read_text())["zero_optimization"]["stage"] == 1
    records = shared.metrics("files")
    assert [r["step"] for r in records] == [1, 2] and all(set(r) >= KEYS for r in records)
    assert records[-1]["tokens"] == 2 * 4 * 32 and all(math.isfinite(r["loss"]) for r in records)
    assert list(folder.rglob("events.out.tfevents*")), "no TensorBoard file"
    assert list(folder.rglob("*.csv")), "no CSV file"


def test_resolved_config_reproduces_the_run(shared: Started) -> None:
    assert shared.ranks(_run_dir(shared, "first"), "optimizer.lr=2e-3").code == 0
    again = Started(shared.folder, shared.folder / "runs" / "first" / "config.yaml")
    assert again.ranks(_run_dir(shared, "second")).code == 0
    assert [r["loss"] for r in shared.metrics("first")] == [r["loss"] for r in shared.metrics("second")]


# SIGTERM goes the same way through the launcher (tests/cluster/test_launch.py) and the ranks (tests/checkpoint/test_killed.py)
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.all_cells), signal.SIGINT])
def test_a_signal_ends_at_a_step_boundary(shared: Started, number: signal.Signals) -> None:
    name = f"signal-{number}"
    process = shared.start(shared.command(_run_dir(shared, name), "train.steps=100000", "parallel.tp=2", procs=2))
    metrics = shared.folder / "runs" / name / "metrics.jsonl"
    end = time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        if process.poll() is not None or time.monotonic() > end:
            kill(process)
            pytest.fail(process.communicate()[0])
        time.sleep(0.1)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + number, output  # so that `train && export` does not go on
    last = shared.metrics(name)[-1]["step"]
    assert f"stopped after step {last}, as a signal asked" in output


def test_a_non_finite_step_stops_with_step_and_rank(shared: Started) -> None:
    done = shared.ranks(_run_dir(shared, "stop"), "optimizer.lr=1e30", "train.grad_clip=0", "train.steps=20", ranks=2)
    assert done.code == 3 and "Traceback" not in done.output
    assert re.search(r"error: step 2: (loss|gradient) on rank 0, 1 is not finite", done.output), done.output
    assert [line["step"] for line in shared.metrics("stop")] == [1], "the step before it is on record, and none after it"


def test_a_non_finite_step_can_be_skipped(shared: Started) -> None:
    keys = ("optimizer.lr=1e30", "train.grad_clip=0", "train.steps=5", "train.on_nonfinite=skip")
    done = shared.ranks(_run_dir(shared, "skip"), *keys, "parallel.tp=2", ranks=2)
    assert done.code == 0, done.output
    records = shared.metrics("skip")
    assert len(records) == 5 and records[-1]["skipped"] and records[-1]["grad_norm"] is None


TEMPLATES = Path(__file__).parents[2] / "ds_configs"
NEEDS_MORE = {"zero3-nvme.json": "libaio", "zeropp.json": "CUDA"}  # the parity suite covers NVMe; quantised ZeRO++ has CUDA kernels only


@pytest.mark.parametrize("template", sorted(p.name for p in TEMPLATES.glob("*.json") if p.name not in NEEDS_MORE))
def test_every_template_takes_a_step(shared: Started, template: str, extension: Callable[[str], None]) -> None:
    if "offload" in template:
        extension("cpu_adam")
    raw = yaml.safe_load(shared.config.read_text())
    raw["train"] = {"steps": 2, "global_batch_size": 4, "seq_length": 32}  # the template says the rest
    raw["zero"] = {"config": str(TEMPLATES / template)}
    raw["run"]["dir"] = str(shared.folder / "runs" / template)
    config = shared.folder / f"{template}.yaml"
    config.write_text(yaml.safe_dump(raw))
    done = Started(shared.folder, config).ranks(ranks=2)
    assert done.code == 0, done.output
    assert len(shared.metrics(template)) == 2


def test_zeropp_is_refused_without_cuda(shared: Started) -> None:
    done = shared.train(f"zero.config={TEMPLATES / 'zeropp.json'}", "zero.stage=3", "train.precision=bf16", procs=2)
    assert done.code == 2 and "CUDA" in done.output and "Traceback" not in done.output


def test_a_hostfile_of_this_machine_alone_needs_no_ssh(shared: Started, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    words = [_run_dir(shared, "hosts"), "train.steps=2", "parallel.tp=2", "--hostfile", str(tmp_path / "hosts")]
    done = shared.run([sys.executable, "-m", "toolkit", "train", str(shared.config), *words])
    assert done.code == 0, done.output
    assert [r["step"] for r in shared.metrics("hosts")] == [1, 2]
