"""A rank that dies while it generates ends the command, with one message that names it, and leaves
no process behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.inference.asking import made  # noqa: E402
from toolkit.inference import ranks as module  # noqa: E402

DEADLINE_S = 180


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a context long enough to be killed in."""
    return made(tmp_path_factory.mktemp("lost"), layers=2, max_position_embeddings=4096)


def ranks_of(mark: str) -> list[psutil.Process]:
    """Processes of this command's ranks, by a variable of their environment that no other command has."""
    found = []
    for process in psutil.process_iter():
        try:
            environ = process.environ()
        except psutil.Error:  # another user's, or one that has just ended
            continue
        if environ.get("DYING") == mark and "RANK" in environ:
            found.append(process)
    return found


def command(folder: Path, *arguments: str, mark: str, module: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", module, "generate", str(folder), "--tokenizer", "bytes", "--max-new-tokens", "4000", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "DYING": mark},
    )


def check_end(process: subprocess.Popen[bytes], *, mark: str, says: str) -> bytes:
    """The command ends by itself, and its whole message is that a rank was killed; what it has written."""
    output, errors = process.communicate(timeout=DEADLINE_S)
    text = errors.decode()
    assert process.returncode == 128 + signal.SIGKILL, text
    assert text.startswith(f"error: {says}: ") and text.count("\n") == 1 and "--batch-size" in text, text
    assert ranks_of(mark) == []
    return output


@pytest.mark.parametrize(
    ("victim", "cut"),
    [
        pytest.param(1, ["parallel.pp=2"], id="last"),
        pytest.param(0, ["parallel.pp=2"], id="first", marks=pytest.mark.all_cells),
        pytest.param(2, ["parallel.tp=2", "parallel.pp=2"], id="tp2", marks=pytest.mark.all_cells),
    ],
)
def test_with_micro_batches_in_flight(victim: int, cut: list[str], folder: Path, tmp_path: Path) -> None:
    """It is killed when two micro-batches have had tokens and wait for the next ones."""
    prompts, killed = tmp_path / "prompts", tmp_path / "killed"
    prompts.write_text("ab\nc\ndef\ng\n")
    mark = f"{victim} {killed}"
    process = command(folder, *cut, "--prompts", str(prompts), mark=mark, module="tests.inference.dying")
    output = check_end(process, mark=mark, says=f"rank {victim} has ended by SIGKILL, one of {2 ** len(cut)}")
    in_flight, tokens = map(int, killed.read_text().split())
    assert in_flight == 2 and tokens >= 6 and output == b""


def test_in_the_middle_of_an_answer(folder: Path, tmp_path: Path) -> None:
    """It is killed from outside when the first words are on the screen."""
    mark = f"nobody {tmp_path}"
    process = command(folder, "parallel.pp=2", "--prompt", "ab", mark=mark, module="toolkit")
    assert process.stdout is not None and process.stdout.read(1), process.communicate()[1]  # the answer has begun
    ranks = {int(rank.environ()["RANK"]): rank for rank in ranks_of(mark)}
    assert sorted(ranks) == [0, 1]
    ranks[1].send_signal(signal.SIGKILL)
    check_end(process, mark=mark, says="rank 1 has ended by SIGKILL, one of 2")


def test_a_signal_is_the_cause_and_what_follows_from_it_is_not() -> None:
    """Both have ended before anyone looked: the one that lost the other ended by an error of its own."""
    ends = ("raise SystemExit(1)", "import os; os.kill(os.getpid(), 9)")
    ranks = [subprocess.Popen([sys.executable, "-c", end]) for end in ends]
    for process in ranks:
        process.wait(DEADLINE_S)
    with pytest.raises(module.RankDied, match="rank 1 has ended by SIGKILL"):
        module._wait(ranks, [])


SCRIPT = """
import os, signal
from pathlib import Path
Path(__file__).with_name("started-" + os.environ["RANK"]).touch()
signal.pause()
"""
RUN = """
import sys
from pathlib import Path
from toolkit.inference import ranks
ranks.MODULE = "cProfile"  # python -m cProfile FILE runs the file
sys.exit(ranks.run_ranks(Path(sys.argv[1]), processes=2))
"""


def test_a_signal_to_the_command_ends_all_ranks(tmp_path: Path) -> None:
    script, mark = tmp_path / "script.py", str(tmp_path)
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, "-c", RUN, str(script)], env={**os.environ, "DYING": mark})
    deadline = time.monotonic() + DEADLINE_S
    while len(list(tmp_path.glob("started-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM
    assert ranks_of(mark) == []
