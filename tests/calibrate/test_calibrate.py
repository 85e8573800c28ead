"""`toolkit calibrate` of this machine: what it measures, what it makes of it, and what estimate reads."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cost.machines import made_up
from toolkit.calibrate import modes, session
from toolkit.cli import app
from toolkit.config.load import as_config
from toolkit.cost.cpu_step import MODES, cpu_step_time
from toolkit.cost.workload import Workload
from toolkit.errors import MachineError
from toolkit.hardware.catalogue import parse_hardware
from toolkit.hardware.cpu import PIECES
from toolkit.plan.ask import estimate, tune

CONFIG = {
    "model": {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "ffn_hidden_size": 256, "vocab_size": 512},
    "train": {"global_batch_size": 8, "micro_batch_size": 2, "seq_length": 32, "precision": "fp32"},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "machine.yaml"
    session.write(made_up(), path)
    return path


def test_estimate_reads_what_calibrate_writes(file: Path) -> None:
    answer = estimate(CONFIG, "cpu:2", calibration=file)
    hardware = replace(parse_hardware("cpu:2"), cpu=made_up())
    w = Workload.of(as_config(CONFIG), 2)
    assert answer["step_s"] == pytest.approx(cpu_step_time(w, hardware).step, rel=1e-3)
    assert "figures of made up" in answer["remark"]
    assert answer["step_s"] != estimate(CONFIG, "cpu:2")["step_s"]


def test_tune_times_every_layout_with_it(file: Path) -> None:
    best = tune(CONFIG, "cpu:2", calibration=file).best
    times = [estimate(CONFIG, "cpu:2", overrides={"parallel.tp": tp, "zero.stage": 1}, calibration=file)["step_s"] for tp in (1, 2)]
    assert best.time.step <= min(times)


def test_the_hosts_own_time_is_found_behind_runs() -> None:
    """Runs that a machine of known host times would have taken give back these times."""
    machine, programs = made_up(), {}
    for mode, (keys, shapes) in (modes.ALONE | modes.TWO).items():
        ranks = modes.ranks_of(mode)
        hardware = replace(parse_hardware(f"cpu:{ranks}"), threads=1, cpu=machine)
        configs = {(n, m): modes.program(keys, layers=n, microbatches=m, ranks=ranks, folder=Path("runs")) for n, m in shapes}
        programs[mode] = [[n, m, cpu_step_time(Workload.of(c, ranks), hardware).step] for (n, m), c in configs.items()]
    assert set(programs) == set(MODES) == set(machine.host)
    found = session.with_host(replace(machine, host={}), programs).host
    for mode, parts in machine.host.items():
        assert found[mode] == pytest.approx({name: parts.get(name, 0.0) for name in found[mode]}, abs=1e-9), mode


MEASURE = """
import json, torch, pathlib, sys
from toolkit.calibrate import pieces, programs, modes
from toolkit.parallel.layout import Layout
from toolkit.train.world import World, connect
connect(World.from_environment(), Layout(), seed=1)
pieces.TOKENS = pieces.WIDTHS = (32, 64)
pieces.SEQUENCES, pieces.HEAD_WIDTHS = (32, 64), (32, 64)
pieces.ELEMENTS = pieces.WEIGHTS = (1024, 2048)
dtype = torch.float32
entry = {"threads": 1, "ranks": 1, "precision": "fp32", "multiplies": pieces.multiplies(dtype), "attention": pieces.attention(dtype)}
entry["pieces"] = pieces.pieces(dtype)
steps = [programs.step_seconds(modes.program({"zero.stage": 1}, layers=1, microbatches=1, ranks=1, folder=pathlib.Path(sys.argv[1])))]
print("\\nFOUND" + json.dumps({"settings": [entry], "torch": torch.__version__, "programs": {"zero1": [[1, 1, steps[0]]]}}))
"""


def test_one_rank_measures_all_that_the_formulas_ask_for(tmp_path: Path) -> None:
    """The real operators and one real run, at sizes that take next to no time."""
    import json

    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.rpartition("FOUND")[2])
    machine = session.assemble([found], processor="this", cores=1, measured="today")
    (setting,) = machine.settings
    assert set(setting.pieces) == set(PIECES)
    assert machine.host["zero1"]["micro"] > 0


@pytest.mark.all_cells
def test_the_command_measures_this_machine(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    done = CliRunner().invoke(app, ["calibrate", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert estimate(CONFIG, "cpu:1", calibration=out)["step_s"] > 0
    assert estimate(CONFIG, "cpu:2", overrides={"parallel.tp": 2}, calibration=out)["step_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--hardware", "cpu:1"], "--hardware without run folders"),
        (["--precision", "fp8"], "--precision 'fp8' is not measured"),
        (["--out", "/nowhere/at/all.yaml"], "its folder does not exist"),
        (["some/run", "--precision", "fp32"], "--precision beside run folders"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["calibrate", *arguments])
    assert says in f"{done.output}{done.exception}"


def test_a_rank_that_fails_is_one_message(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MachineError, match="rank 0 of 1 could not measure this machine"):
        session.measure()
