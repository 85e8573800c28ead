"""`toolkit rehearse` as a user runs it: what it prints and writes, and one message for what cannot
be rehearsed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.parity.cells import Cell
from toolkit.config.load import parse_config
from toolkit.rehearse.session import Job, RehearsalError, run

CELL = Cell(4, {"parallel.pp": 2, "zero.stage": 1, "train.micro_batch_size": 2, "train.precision": "bf16"})


def write_run(folder: Path) -> None:
    """run.yaml, and the folder of a run of its own."""
    raw = {**CELL.raw(), "run": {"dir": "runs/mine"}, "checkpoint": {"every": 1}}
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    (folder / "runs" / "mine" / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "runs" / "mine" / "metrics.jsonl").write_text("{}")


def rehearse(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command in that folder."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])]), "COLUMNS": "200", **environ}
    command = [sys.executable, "-m", "toolkit.cli", "rehearse", "run.yaml", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900, check=False)


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if "__pycache__" not in p.parts}


def test_all_ranks_as_json_and_a_trace_of_each(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_run(tmp_path)
    before = files(tmp_path)
    done = rehearse(tmp_path, "--hardware", "h100-80gb:4x1", "--ranks", "all", "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [(r["rank"], r["stage"]) for r in said["ranks"]] == [(0, 0), (1, 0), (2, 1), (3, 1)] and said["findings"] == []
    for rank in said["ranks"]:
        assert rank["step"]["peak"]["nbytes"] == sum(rank["step"]["peak"]["parts"].values()) > 0
        assert rank["step"]["peak"]["nbytes"] > rank["evaluation"]["peak"]["nbytes"] > 0, "an evaluation keeps nothing for a backward"
        assert [what for what, *_ in rank["save"]["syncs"]] == ["cuda.synchronize"], "a save waits once, for all its copies"
        assert {row["operation"] for row in rank["traffic"]} == {"send", "recv", "allreduce", "reduce_scatter", "allgather"}
        assert json.loads((out / f"trace-rank{rank['rank']}.json").read_text())["traceEvents"]
    assert {k: v for k, v in files(tmp_path).items() if not k.startswith("out")} == before, "the run's own files are left alone"


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (["parallel.tp=3"], {}, "parallel.tp=3"),
        (["--steps", "0"], {}, "--steps 0 is too few"),
        (["--ranks", "4"], {}, "--ranks names rank 4: the run has 4"),
        ([], {"TORCH_EXTENSIONS_DIR": "none", "CXX": "no-such-compiler"}, "no-such-compiler is not found"),
    ],
)
def test_one_message(tmp_path: Path, arguments: list[str], environ: dict[str, str], words: str) -> None:
    write_run(tmp_path)
    done = rehearse(tmp_path, "--hardware", "h100-80gb:4x1", *arguments, **environ)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("error: ") == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_progress_goes_from_nothing_to_all() -> None:
    seen: list[tuple[str, float]] = []
    job = Job(config=parse_config(CELL.raw()), world=4, rank=0, steps=1, hardware="h100-80gb:4x1")
    answers = run([job], progress=lambda what, share: seen.append((what, share)))
    assert "error" not in answers[0]
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == 1.0
    assert {"starting", "rank 0: model and engine", "rank 0: step 1", "rank 0: done"} <= {what for what, _ in seen}


def test_a_torch_that_has_changed_within_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that the stand-ins need is gone, as it may be in another version."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch.distributed._tools.fake_collectives'] = None\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
    job = Job(config=parse_config(CELL.raw()), world=4, rank=0, hardware="h100-80gb:4x1")
    with pytest.raises(RehearsalError, match=r"could not start: .*fake_collectives.*constraints.txt"):
        run([job])
