"""The GPU check itself: its list on a CPU, faults that must make its page red, and its runs
rehearsed as CUDA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import ConfigError
from toolkit.gpu_check import page, wheels
from toolkit.gpu_check.checks import CHECKS
from toolkit.gpu_check.command import choose, main
from toolkit.gpu_check.rows import same_training, within
from toolkit.gpu_check.session import Outcome, run_checks
from toolkit.gpu_check.setting import Setting

FAULTY = "tests.gpu_check.faulty_worker"
ROOT = Path(__file__).parents[2]


def check(folder: Path, *arguments: str, worker: str | None = None) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON and the page of a check on the CPU."""
    given = {"worker": worker} if worker else {}
    code = main(["--device", "cpu", "--quick", "--out", str(folder), "--keep", str(folder / "kept"), *arguments], **given)
    (path,) = folder.glob("gpu-check-cpu-*.json")
    return code, json.loads(path.read_text()), path.with_suffix(".md").read_text()


def verdicts(report: dict[str, Any]) -> dict[str, str]:
    return {c["name"]: c["verdict"] for c in report["checks"]}


def test_what_is_as_expected_is_green(tmp_path: Path) -> None:
    code, report, text = check(tmp_path, "--only", "versions,collectives")
    assert code == 0 and "**Green.**" in text, text
    assert verdicts(report) == {"versions": "pass", "collectives": "pass"}


@pytest.mark.all_cells
def test_the_whole_list_on_a_cpu(tmp_path: Path) -> None:
    names = ",".join(c.name for c in CHECKS if c.name != "offload")
    code, report, text = check(tmp_path, "--only", names, "--minutes", "30")
    assert code == 0, text
    assert {c["name"] for c in report["checks"] if c["verdict"] == "skip"} == {"waits", "transformer-engine"}


def test_a_loss_that_differs_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "loss")
    code, report, text = check(tmp_path, "--only", "zero", worker=FAULTY)
    assert code == 1 and "**Red.** 1 of 2 checks failed: zero." in text
    rows = {r["name"]: r["verdict"] for r in report["checks"][1]["rows"]}
    assert {n for n, v in rows.items() if v == "fail"} == {"zero3-fp32", "zero3-bf16"} and "last loss" in text
    assert {f"zero{n}-{p}" for n in range(3) for p in ("fp32", "bf16")} <= {n for n, v in rows.items() if v == "pass"}


def test_a_check_that_hangs_is_ended_with_its_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "hang")
    hanging = replace(CHECKS[0], seconds=8.0)
    (outcome,) = run_checks([hanging], Setting(folder=tmp_path, device="cpu", quick=True), minutes=5, worker=FAULTY)
    assert outcome.state == "hang" and outcome.verdict == "fail"
    assert "wait_for_ever" in outcome.trace


def test_a_process_that_ends_is_an_error_and_the_next_check_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "gone")
    both = [CHECKS[0], replace(CHECKS[0], name="collectives")]
    outcomes = run_checks(both, Setting(folder=tmp_path, device="cpu", quick=True), minutes=5, worker=FAULTY)
    assert [(o.name, o.state) for o in outcomes] == [("versions", "error"), ("collectives", "error")]
    assert all("exit code 7" in o.note for o in outcomes)


def test_a_budget_that_is_over_starts_nothing(tmp_path: Path) -> None:
    code, report, text = check(tmp_path, "--only", "versions", "--minutes", "0.1")
    assert code == 1 and report["checks"][0]["state"] == "not started" and "0.1 minutes are over" in text


def start(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "toolkit.gpu_check", *arguments]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=False)


def test_a_machine_without_a_gpu_is_told(tmp_path: Path) -> None:
    done = start("--out", str(tmp_path), CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 2 and done.stderr.startswith("error: there is no GPU") and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; "
         "runpy.run_module('toolkit.gpu_check', run_name='__main__')"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "is not installed" in done.stderr and "Traceback" not in done.stderr


def test_wheels_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(wheels, "_installed", lambda name: name != "deepspeed")
    assert wheels.install(tmp_path, tmp_path / "into") == 2
    assert "has no wheel of deepspeed" in capsys.readouterr().err


def test_names_bring_what_they_build_on() -> None:
    assert [c.name for c in choose("zero")] == ["reference", "zero"]
    with pytest.raises(ConfigError, match="no such check"):
        choose("nothing")


@pytest.mark.parametrize(
    ("found", "verdict"),
    [([(5.0, 1.0), (4.0, 1.0)], "pass"), ([(5.0, 1.0)], "fail"), ([(5.0, 1.0), (4.001, 1.0)], "fail"), ([(5.0, 1.0), (4.0, None)], "fail")],
)
def test_steps_are_compared_one_by_one(found: Sequence[tuple[float, float]], verdict: str) -> None:
    wanted = [{"step": i, "loss": loss, "grad_norm": 1.0} for i, loss in enumerate((5.0, 4.0))]
    steps = [{"step": i, "loss": loss, "grad_norm": norm} for i, (loss, norm) in enumerate(found)]
    assert same_training("x", steps, wanted, (1e-5, 1e-4)).verdict == verdict


def test_waits_are_counted_by_their_line() -> None:
    from toolkit.gpu_check.measure import Waits, wait_rows

    seen = Waits()
    with seen.counted():
        for _ in range(6):
            warnings.warn("called a synchronizing CUDA operation")
        assert sum(seen.places.values()) == 6
    (place,) = seen.places
    assert "gpu_check/test_gpu_check.py" not in place or place.endswith("test_waits_are_counted_by_their_line")
    rows = wait_rows("x", {"engine/zero.py:3 finish": 6, "zero/stage3.py:1 f": 3, "train/loop.py:2 g": 3}, {"engine/zero.py"}, known=True)
    assert [r.verdict for r in rows] == ["pass", "fail", "note"] and rows[0].measured == "2 a step"


def test_a_page_is_red_until_it_is_whole() -> None:
    row = within("peak", 12.0, 10.0, 0.1).as_json()
    done = Outcome(name="a", title="A", state="done", rows=[row]).as_json()
    report = {"device": "NVIDIA H100 80GB HBM3", "date": "d", "command": "c", "version": "v", "seconds": 60.0, "minutes": 14.0}
    text = page.markdown({**report, "planned": ["a", "b"], "checks": [done]})
    assert "Not finished: b" in text and "| peak | **FAIL** | 12 | 10 | ±0.1 | 20.0 % apart |" in text
    assert page.slug(str(report["device"])) == "nvidia-h100-80gb-hbm3"


REHEARSED = ("waits", "resume")  # the others train what tests/rehearse does, or models of a real size


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.all_cells)])
def test_the_runs_are_rehearsed_as_cuda(quick: bool, tmp_path: Path) -> None:
    from toolkit.gpu_check.rehearsed import rehearse_all

    setting = Setting(folder=tmp_path, quick=quick)
    runs = {n: raw for c in CHECKS if not quick or c.name in REHEARSED for n, raw in c.rehearsed(setting).items()}
    found = rehearse_all({n: runs[n] for n in ("waits-zero3", "undisturbed")} if quick else runs, hardware="h100-80gb:1x1")
    assert {n: one["error"] for n, one in found.items() if "error" in one} == {}
    assert {n for n, one in found.items() if "refused" in one} <= {"te", "zero3-optimizer-nvme", "zero3-optimizer-nvme-bf16"}
    assert all(one["allocated"] > 0 for one in found.values() if "refused" not in one)
