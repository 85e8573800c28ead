"""`toolkit init` writes a YAML that starts, and `train --dry-run` says what would run without running it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tests.train.conftest import TINY
from toolkit.cli import app
from toolkit.config.load import load_config
from toolkit.cost.memory import GIB, estimate
from toolkit.cost.workload import Workload
from toolkit.errors import ConfigError
from toolkit.hardware.catalogue import parse_hardware
from toolkit.parallel.rules import check


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    return tmp_path


def run(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    ("model", "spec", "gpus"),
    [
        ("small", "cpu:1", 1),
        ("smollm2-135m", "cpu:2", 2),
        ("llama3-8b", "h100-80gb:8", 8),
        ("gpt2-1.5b", "a100-40gb:8x2", 16),
        ("llama3.1-8b", "h200-141gb:1", 1),
    ],
)
def test_what_init_writes_is_legal_and_fits(model: str, spec: str, gpus: int) -> None:
    said = run("init", "my.yaml", "--model", model, "--hardware", spec, "--data", "text")
    config, hardware = load_config(Path("my.yaml")), parse_hardware(spec)
    assert f"of {hardware}" in said and said.rstrip().endswith(
        "my.yaml --hostfile hostfile" if gpus > 8 else f"--num-procs {said.split(': ')[1].split()[0]}"
    )
    used = int(said.split(": ")[1].split()[0])
    check(config, used, machine=hardware.machine)
    spare = 0.1 * hardware.gpu.memory_gib * GIB if hardware.gpu.accelerator else 0
    assert used <= gpus and estimate(Workload.of(config, used), hardware).worst.device <= hardware.gpu.memory_gib * GIB - spare
    assert (config.data.source, config.run.dir, config.train.steps) == ("text", Path("runs/my"), 200)
    assert config.checkpoint.every == 40 and "tokenizer" not in config.data.model_fields_set


def test_init_without_a_terminal_asks_nothing_and_writes_over_nothing() -> None:
    run("init")
    assert load_config(Path("run.yaml")).data.source == "python-stdlib"
    with pytest.raises(ConfigError, match=r"run\.yaml exists: init never writes over a file"):
        run("init")


def test_init_names_the_nearest_model() -> None:
    with pytest.raises(ConfigError, match="Did you mean llama3-8b"):
        run("init", "--model", "lama3-8b")


def test_init_asks_in_a_terminal() -> None:
    """A real one: a pseudo-terminal, and a person who answers both questions."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
        os.execv(sys.executable, [sys.executable, "-m", "toolkit", "init", "asked.yaml"])
    os.write(terminal, b"gpt2-124m\nmine.txt\n")
    said = b""
    while True:
        try:
            said += (part := os.read(terminal, 4096))
        except OSError:  # the other end is closed
            break
        if not part:
            break
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said
    config = load_config(Path("asked.yaml"))
    assert (config.model.preset, config.data.source) == ("gpt2-124m", "mine.txt") and b"model: small, or a preset" in said


@pytest.fixture
def tiny(text: Path) -> str:
    Path("tiny.yaml").write_text(yaml.safe_dump({**TINY, "data": {"source": str(text)}, "checkpoint": {"every": 2}}))
    return "tiny.yaml"


def test_a_dry_run_says_what_would_run_and_leaves_nothing_behind(tiny: str, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    said = run("train", tiny, "parallel.tp=2", "--num-procs", "2", "--dry-run")
    for words in (
        "2 processes: tp 2",
        "4 micro-batches of 1",
        "fits: stage 0",
        "which the run prepares first",
        "metrics.jsonl",
        "every 2 steps",
    ):
        assert words in said, words
    assert sorted(folder.rglob("*")) == before
    command = shlex.split(said.splitlines()[-1])
    while "=" in command[0]:  # the environment
        command.pop(0)
    assert command[-4:] == ["--module", "toolkit.train", tiny, "parallel.tp=2"] and Path(command[0]).exists()


def test_a_dry_run_refuses_what_a_run_refuses(tiny: str) -> None:
    from toolkit.errors import DataError, LayoutError

    with pytest.raises(LayoutError, match=r"parallel\.tp=4 does not divide model\.num_query_groups=2"):
        run("train", tiny, "parallel.tp=4", "--num-procs", "4", "--dry-run")
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        run("train", tiny, "data.source=/nowhere.txt", "--dry-run")


def test_a_dry_run_knows_prepared_data(tiny: str, text: Path) -> None:
    run("data", "prepare", str(text), "--out", "data/mine")
    said = run("train", tiny, "data.source=data/mine", "--dry-run")
    assert "257 ids" in said and "sizes count the padding alone" not in said
