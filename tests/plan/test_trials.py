"""Trials and calibration for real: two layouts of a tiny model on two CPU processes, and what goes wrong in trials."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from tests.train.conftest import TINY, Started
from toolkit.cli import app
from toolkit.config.load import load_config
from toolkit.errors import ConfigError, ToolkitError
from toolkit.evidence import runs
from toolkit.hardware import calibration
from toolkit.hardware.catalogue import find_gpu, parse_hardware
from toolkit.plan.trials import judge, read_trial, run_trials, trial_config
from toolkit.plan.tune import Question

FIXES = ("--fix", "dp=1", "--fix", "zero.stage=1", "--fix", "micro=1", "--fix", "recompute=none", "--fix", "vpp=1", "--fix", "sp=false")


@dataclass
class Tried:
    """One real `toolkit tune --trials 2` and its output."""

    folder: Path
    config: Path
    output: str

    @property
    def out(self) -> Path:
        return self.folder / "plan"

    @property
    def command(self) -> list[str]:
        return [
            sys.executable,
            "-m",
            "toolkit.cli",
            "tune",
            str(self.config),
            "--hardware",
            "cpu:2",
            *FIXES,
            "--trials",
            "2",
            "--trial-steps",
            "3",
        ]

    @property
    def ranking(self) -> dict[str, Any]:
        return json.loads((self.out / "tune.json").read_text())


@pytest.fixture(scope="module")
def tried(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Tried:
    folder = tmp_path_factory.mktemp("trials")
    config = folder / "tiny.yaml"
    data = {"source": str(text), "cache_dir": str(folder / "data"), "workers": 0}
    config.write_text(yaml.safe_dump({**TINY, "data": data, "run": {"dir": str(folder / "runs" / "run")}}))
    tried = Tried(folder, config, "")
    done = Started(folder, config).run([*tried.command, "--out", str(tried.out)])
    assert done.code == 0, done.output
    tried.output = done.output
    return tried


def test_the_best_are_run_and_ranked_by_what_was_measured(tried: Tried) -> None:
    trials = tried.ranking["trials"]
    assert [t["status"] for t in trials] == ["ran", "ran"]
    assert trials[0]["step_s"] <= trials[1]["step_s"] and all(t["memory_gib"] > 0 for t in trials)
    assert {t["plan"] for t in trials} == {1, 2}
    fastest = tried.ranking["plans"][trials[0]["plan"] - 1]["layout"]
    written = load_config(tried.out / "run.yaml")
    assert (written.parallel.tp, written.parallel.pp) == (fastest["tp"], fastest["pp"])
    assert (tried.out / "launch.sh").read_text().rstrip().endswith(f'--num-procs {fastest["tp"] * fastest["pp"]} "$@"')
    for trial in trials:
        assert len((Path(trial["folder"]) / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert "measured" in tried.output and "trial 2 of 2: ran" in tried.output


def test_a_second_call_runs_nothing_again(tried: Tried) -> None:
    before = {path: path.stat().st_mtime_ns for path in tried.out.rglob("*.jsonl")}
    again = CliRunner().invoke(app, [*tried.command[3:], "--out", str(tried.out), "--json", "--no-what-if"])
    assert again.exit_code == 0 and json.loads(again.stdout)["trials"] == tried.ranking["trials"]
    assert before == {path: path.stat().st_mtime_ns for path in tried.out.rglob("*.jsonl")}


def _question(config: Path, *overrides: str) -> Question:
    return Question(config=load_config(config, overrides), hardware=parse_hardware("cpu:2"), fixed={"tp": (2,), "dp": (1,)})


def test_a_trial_that_fails_or_takes_too_long_is_a_result(tried: Tried, tmp_path: Path) -> None:
    failing = _question(tried.config, "data.source=/nowhere.txt", "data.cache_dir=null", f"run.dir={tmp_path}/run")
    plans = failing.ask(top=1).plans
    (failed,) = run_trials(failing, plans, tmp_path / "a", steps=3)
    assert failed.status == "failed" and "/nowhere.txt" in failed.reason and failed.step_s is None
    assert read_trial(plans[0], failed.folder) == failed
    slow = _question(tried.config)
    (late,) = run_trials(slow, slow.ask(top=1).plans, tmp_path / "b", steps=3, deadline_s=0.5)
    assert late.status == "timed out" and "0.5 s" in late.reason
    left = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert not any(str(tmp_path / "b") in words for words in left), "nothing of an ended trial goes on"


def test_memory_that_runs_out_is_told_from_other_failures(tried: Tried, tmp_path: Path) -> None:
    plan = _question(tried.config).ask(top=1).plans[0]
    with (tmp_path / "log.txt").open("wb") as log:
        code = subprocess.run([sys.executable, "-c", "import torch; torch.empty(1 << 55)"], stderr=log).returncode
    trial = judge(plan, tmp_path, code, deadline_s=60)
    assert trial.status == "out of memory" and "allocate memory" in trial.reason


def test_a_damaged_result_is_run_again(tried: Tried, tmp_path: Path) -> None:
    asked = _question(tried.config)
    plan = asked.ask(top=1).plans[0]
    _, place = trial_config(asked.config, plan, tmp_path, steps=3)
    place.mkdir()
    (place / "result.json").write_text('{"status": "ran"')
    assert read_trial(plan, place) is None


def _calibrate(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["calibrate", *arguments])
    if isinstance(done.exception, ToolkitError):
        return done.exception.exit_code, str(done.exception)
    return done.exit_code, done.output


def test_calibrating_meets_the_median_run_and_the_planner_takes_it(tried: Tried, tmp_path: Path) -> None:
    folders = [Path(t["folder"]) / "run" for t in tried.ranking["trials"]]
    out = tmp_path / "mine.yaml"
    code, text = _calibrate(*map(str, folders), "--out", str(out))
    assert code == 0 and f"--calibration {out}" in text
    (entry,) = yaml.safe_load(out.read_text())["scales"]
    assert (entry["gpu"], entry["precision"], entry["rows"], entry["steps"]) == ("cpu", "fp32", 2, 4)
    assert entry["sources"] == sorted(map(str, folders)) and entry["fitted"]
    assert prod(1 + bias for bias in entry["bias_left"].values()) == pytest.approx(1, rel=0.05), "as far above one as below the other"
    assert calibration.scale_for(find_gpu("cpu"), "fp32", users_file=out) == entry["scale"]
    assert calibration.scale_for(find_gpu("h100"), "bf16", users_file=out) == calibration.scale_for(find_gpu("h100"), "bf16")
    one = runs.calibrate([runs.read_run(folders[0])])[0]
    assert abs(one["bias_left"][str(folders[0])]) < 0.02, "one run is met exactly"
    shown = CliRunner().invoke(
        app, ["estimate", str(folders[0] / "config.yaml"), "--hardware", "cpu:2", "--calibration", str(out), "--json"]
    )
    assert json.loads(shown.stdout)["calibration"] == entry["scale"]


def test_runs_that_say_too_little_are_refused(tried: Tried, tmp_path: Path) -> None:
    folder = Path(tried.ranking["trials"][0]["folder"]) / "run"
    assert "neither a profile.json nor steps" in _calibrate(str(tmp_path))[1]
    assert "has 1" in _calibrate(str(folder), "--hardware", "cpu:1")[1]
    for name, words in (("machine.json", "does not record its hardware"), ("ds_config.json", "no readable ds_config.json")):
        copy = tmp_path / name.partition(".")[0]
        shutil.copytree(folder, copy)
        (copy / name).unlink()
        code, text = _calibrate(str(copy), "--out", str(tmp_path / "none.yaml"))
        assert code == 2 and words in text and not (tmp_path / "none.yaml").exists()
    assert "cannot be written" in _calibrate(str(folder), "--out", str(tmp_path))[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scales: 3", "it has no scales"),
        ("scales: [{gpu: cpu, precision: fp32, scale: -1}]", "has scale -1"),
        ("scales: [", "cannot be read"),
    ],
)
def test_a_wrong_calibration_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        calibration.load(path)


def test_runs_that_disagree_are_remarked() -> None:
    entry = {"gpu": "cpu", "precision": "fp32", "scale": 1e-4, "bias_left": {"a": 0.5, "b": -0.3}}
    assert len(runs.remarks([entry])) == 2
    assert runs.remarks([entry | {"scale": 0.5, "bias_left": {"a": 0.01}}]) == []
