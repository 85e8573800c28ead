"""What the report shows of hosts: recoveries with their phases, and ranks that worked longer than others."""

from __future__ import annotations

import json
from pathlib import Path

from toolkit.report.page import page
from toolkit.runfolder.files import write_ranks
from toolkit.runfolder.read import read_runs
from toolkit.runfolder.recoveries import Recovery, add_recovery, read_recoveries

STEP = {"step": 1, "loss": 5.0, "grad_norm": 1.0, "lr": 1e-3, "tokens": 8, "tokens_per_s": 8.0, "tflops_per_gpu": 0.0, "mfu": None}
STEP |= {"step_s": 1.0, "data_wait_s": 0.0, "memory_gib": 0.1}


def test_recoveries_and_slow_ranks_are_shown(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    seconds = {"detect": 10.5, "tear down": 0.3, "plan": 0.1, "start": 7.0, "load": 1.2, "first step": 0.9}
    one = Recovery(at="2026-11-27T09:00:00", reason="lost node-<3>", hosts=2, layout="dp 2", last_step=25, resumed_step=20, seconds=seconds)
    add_recovery(tmp_path, one)
    with (tmp_path / "recoveries.jsonl").open("a") as file:
        file.write('{"at": "cut o')
    write_ranks(tmp_path, own_s=[0.2, 0.31], hosts=["node-1", "node-2"])
    assert list(read_recoveries(tmp_path)) == [one] and one.steps_lost == 5
    html = page(read_runs([tmp_path]))
    assert "lost node-&lt;3&gt;" in html and "10.5" in html and "first step, s" in html
    assert html.index(">rank 1<") < html.index(">rank 0<") and "0.310" in html


def test_a_run_without_them_has_no_such_section(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    assert "Recoveries" not in page(read_runs([tmp_path]))
