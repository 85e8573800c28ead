"""A run that fails shows one cause and not its echoes; every rank keeps its own words; secrets stay
out of all of it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.runs import Run
from tests.train.conftest import Started
from toolkit.config.load import load_config, parse_config
from toolkit.errors import MachineError
from toolkit.redact import hide_secrets, is_secret, redact, redact_values
from toolkit.runfolder.files import write_run
from toolkit.train import console as console_module
from toolkit.train.console import ConsoleLog
from toolkit.train.failures import failure_lines, is_echo, note

SECRET = "hub-4711-abcdef"
ROOT = Path(__file__).parents[2]
START = """
import logging, os, sys
from pathlib import Path
from toolkit.cluster.launch import run_local
from toolkit.train.console import launcher_log
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
with launcher_log(Path(sys.argv[2])):
    sys.exit(run_local(sys.argv[1], sys.argv[2:], num_procs=2, module="tests.train.failing"))
"""


def fail(how: str, folder: Path) -> tuple[int, str]:
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "HUB_TOKEN": SECRET}
    command = [sys.executable, "-c", START, how, str(folder)]
    done = subprocess.run(command, env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, umask=0)
    return done.returncode, done.stdout


def test_the_cause_is_shown_once_and_its_echo_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, output = fail("raise", folder)
    assert code == 1
    assert output.count("Traceback") == 1 and "rank 1 failed:" in output and "Connection closed" not in output, output
    assert "first to fail was rank 1 on " in output and "the 7th shard is odd" in output
    own = {rank: (folder / "logs" / f"rank-0000{rank}.log").read_text() for rank in (0, 1)}
    assert "the 7th shard is odd" in own[1] and "rank 1 knows" in own[1] and "rank 1 of 2 on " in own[1]
    assert "the 7th shard is odd" not in own[0]
    sockets = set(" ".join(re.findall(r"listens at (.*)", own[0] + own[1])).split())
    assert sockets == {"127.0.0.1"}, "a socket is open to other hosts"
    loose = [str(p) for p in (folder, *folder.rglob("*")) if p.stat().st_mode & stat.S_IWOTH]
    assert not loose, "written under a umask of 0"
    kept = (folder / "console.log").read_text()
    assert kept.count("Traceback") == 1 and "first to fail was rank 1" in kept
    everything = output + "".join(p.read_text() for p in folder.rglob("*") if p.is_file())
    assert SECRET not in everything and "<HUB_TOKEN>" in output


def test_a_rank_that_was_killed_is_named_though_it_said_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, output = fail("kill", folder)
    assert code != 0 and "Traceback" not in output, output
    assert "rank 0 lost another rank" in output and "not heard from: rank 1 " in output, output


def test_echoes_are_told_from_causes() -> None:
    assert is_echo(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41234"))
    assert not is_echo(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_echo(ConnectionResetError("Connection reset by peer")), "a download of the user's own"


def test_ranks_with_the_same_error_show_it_once(tmp_path: Path) -> None:
    error = ValueError("the same everywhere")
    assert [note(tmp_path, error, rank=rank) for rank in range(3)] == [True, False, False]
    assert "first to fail was rank 0" in failure_lines(tmp_path, since=0)[0] and "2 other ranks" in failure_lines(tmp_path, since=0)[0]
    assert note(tmp_path / "absent", error, rank=1) and note(None, error, rank=1), "where nothing can be noted, all is shown"


def test_an_echo_before_the_cause_does_not_hide_it(tmp_path: Path) -> None:
    assert note(tmp_path, RuntimeError("Connection closed by peer"), rank=0)
    assert not note(tmp_path, RuntimeError("Connection closed by peer"), rank=2)
    assert note(tmp_path, ValueError("the cause"), rank=1)
    assert "rank 1" in failure_lines(tmp_path, since=0)[0]


def test_what_an_earlier_start_noted_does_not_count(tmp_path: Path) -> None:
    assert note(tmp_path, ValueError("of before"), rank=0)
    path = tmp_path / "logs" / "failures.jsonl"
    path.write_text(json.dumps({**json.loads(path.read_text()), "time": 1.0}) + "\nhalf a li")
    assert failure_lines(tmp_path, since=2.0) == []
    path.write_text(path.read_text() + "\n")
    assert note(tmp_path, ValueError("of now"), rank=1)


def test_a_ranks_file_is_rotated_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "RANK_BYTES", 2000)
    log = logging.getLogger("toolkit.train")
    log.setLevel(logging.INFO)
    with ConsoleLog(rank=3) as console:
        log.info("early")
        console.open(tmp_path, step=0, processes=4)
        for i in range(200):
            log.info("line %d", i)
    files = sorted((tmp_path / "logs").iterdir())
    assert [f.name for f in files] == ["rank-00003.log", *(f"rank-00003.log.{i}" for i in (1, 2, 3))]
    assert all(f.stat().st_size <= 2000 for f in files) and "line 199" in files[0].read_text()
    assert not (tmp_path / "console.log").exists(), "rank 3 warned of nothing"


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "OPENAI_APIKEY", "my_secrets"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "KEYBOARD", "PATH", "HOME"])
def test_names_of_no_secrets(name: str) -> None:
    assert not is_secret(name)


def test_secrets_do_not_reach_saved_configs_or_tracebacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("DB_PASSWORD", "short")
    raw = {"model": {"preset": "llama3.2-1b"}, "run": {"dir": str(tmp_path / "run")}, "data": {"source": f"https://x:{SECRET}@hub/text"}}
    config = parse_config(raw)
    folder = write_run(config, {"monitor": {"key": [SECRET, 1]}})
    assert all(SECRET not in p.read_text() for p in folder.iterdir())
    assert load_config(folder / "config.yaml").data.source == "https://x:<HF_TOKEN>@hub/text"
    assert config.data.source is not None and SECRET in config.data.source, "the run itself keeps it"
    assert redact("a short way") == "a short way", "what is in ordinary words stays"
    assert redact_values({SECRET: (SECRET, None)}) == {"<HF_TOKEN>": ["<HF_TOKEN>", None]}


def test_an_error_that_nobody_catches_is_shown_without_secrets(tmp_path: Path) -> None:
    code = f"import logging; from toolkit.redact import hide_secrets; logging.basicConfig(); hide_secrets(); logging.error('{SECRET}'); 1 / len('{SECRET}'[:0])"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "HF_TOKEN": SECRET}, capture_output=True, text=True)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and SECRET not in done.stderr and done.stderr.count("<HF_TOKEN>")
    assert callable(hide_secrets)


def test_a_disk_that_is_full_while_steps_are_recorded_is_a_message(shared: Started, tmp_path: Path) -> None:
    """A limit on the size of a file stands for it: only the record of steps grows to that size."""
    words = [f"run.dir={tmp_path / 'run'}", "train.steps=60", "log.every=100", "data.workers=0"]
    assert Run(shared.config, *words, f"run.dir={tmp_path / 'first'}").wait() == 0  # prepares the data, and its order for so many steps
    run = Run(shared.config, *words, limits={resource.RLIMIT_FSIZE: 8192})
    assert run.wait() == MachineError.exit_code, run.text()
    assert "Traceback" not in run.text() and re.search(r"error: \S+metrics.jsonl cannot be written: File too large", run.text())
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) > 10
