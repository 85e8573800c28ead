"""The command as a user meets it: versions, Ctrl-C, numbers of processes, and the exit codes that
docs name.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from toolkit import __version__, errors
from toolkit.cluster.launch import _exit_code
from toolkit.cluster.launch import main as check_hostfile
from toolkit.cluster.stalls import REQUEUE
from toolkit.convert.source import GGUF_PACKAGES

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project() -> dict[str, dict[str, object]]:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())  # type: ignore[no-any-return]


def test_no_message_sends_people_to_a_package_of_somebody_else(project: dict[str, dict[str, object]]) -> None:
    assert project["project"]["name"] == "megatron-deepspeed-toolkit"
    pages = [*ROOT.glob("toolkit/**/*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/**/*"), ROOT / "Makefile"]
    wrong = re.compile(r"pip install[^\n]*(?<![\w-])toolkit(?![\w/-])")
    assert [str(p) for p in pages if p.is_file() and wrong.search(p.read_text(errors="replace"))] == []


def test_the_extra_for_hugging_face_holds_what_gguf_needs(project: dict[str, dict[str, object]]) -> None:
    extras = project["project"]["optional-dependencies"]
    assert isinstance(extras, dict)
    assert {re.split(r"[<>=]", words)[0] for words in extras["hf"]} >= set(GGUF_PACKAGES)


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, timeout=120, **options)  # type: ignore[call-overload, no-any-return]


def test_the_module_is_the_command() -> None:
    done = run("-m", "toolkit", "--version")
    assert (done.returncode, done.stdout) == (0, f"toolkit {__version__}\n"), done.stderr


@pytest.mark.parametrize("moment", ["importing", "working"])
def test_ctrl_c_before_a_run_starts_is_exit_code_130_without_a_traceback(moment: str, tmp_path: Path) -> None:
    """The signal comes from a file that the command reads: a config (a pipe, so that it waits), or
    a module that it imports.
    """
    if moment == "importing":
        (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
        process = subprocess.Popen(
            [sys.executable, "-m", "toolkit", "train", "x.yaml"],
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
            stderr=subprocess.PIPE,
            text=True,
        )
    else:
        os.mkfifo(tmp_path / "run.yaml")
        command = [sys.executable, "-m", "toolkit", "train", str(tmp_path / "run.yaml")]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
        with (tmp_path / "run.yaml").open("w"):  # returns once the command has opened it to read
            process.send_signal(signal.SIGINT)
            assert process.wait(60) is not None
    error = process.communicate(timeout=600)[1]
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in error, error


def test_the_ranks_end_by_sigterm_and_the_exit_code_is_of_what_was_sent() -> None:
    term, stopped = 256 - signal.SIGTERM, errors.Stopped.exit_code
    assert [_exit_code(code, asked=signal.SIGINT) for code in (term, -signal.SIGTERM, stopped)] == [130, 130, 130]
    assert [_exit_code(code, asked=signal.SIGTERM) for code in (term, stopped)] == [143, 143]
    assert [_exit_code(code, asked=signal.SIGINT) for code in (0, 2)] == [0, 2], "it ended by itself before"
    assert _exit_code(256 - signal.SIGKILL, asked=signal.SIGINT) == 137, "a second signal"
    assert _exit_code(stopped, asked=None) == 143


def test_a_hostfile_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts").write_bytes(b"\xff\xfe\x00")
    assert check_hostfile(["--hostfile", str(tmp_path / "hosts"), "--env-file", str(tmp_path / "env")]) == 2
    assert "cannot be read: it is not text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("train", "{}", "--num-procs", "0"),
        ("profile", "{}", "--num-procs", "-1"),
        ("data", "prepare", "{}", "--out", "{}", "--workers", "-3"),
    ],
)
def test_a_number_of_processes_below_1_is_refused_before_anything_else(words: tuple[str, ...], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from toolkit.cli import app

    done = CliRunner().invoke(app, [word.format(tmp_path / "none.yaml") for word in words])
    assert isinstance(done.exception, errors.ConfigError) and f"{words[-2]} {words[-1]} is less than 1" in str(done.exception)


def test_the_exit_codes_of_the_docs_are_the_errors_own() -> None:
    page = (ROOT / "docs/exit-codes.md").read_text()
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.M)}
    own = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ToolkitError)}
    assert codes == own | {0, 1, REQUEUE, 130, 137, 143}
