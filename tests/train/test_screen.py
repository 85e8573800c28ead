"""What a user sees of a run and finds in its folder: the bar, the last lines, console.log."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.site.warm import run_toolkit
from tests.train.conftest import Started
from tests.train.terminal import on_terminal, screen
from toolkit.config.load import parse_config
from toolkit.errors import Stopped, TrainingError
from toolkit.runfolder.metrics import StepRecord
from toolkit.train.console import ConsoleLog, launcher_log
from toolkit.train.words import Outcome, closing_lines

STEP = re.compile(r"step \d/4 \| loss ")


@pytest.fixture(scope="module")
def shown(shared: Started) -> tuple[list[str], str, Path]:
    """A run of 4 steps on 2 ranks that a person watches: the screen at its end, all that was
    written, its folder.
    """
    folder = shared.folder / "runs" / "watched"
    keys = [f"run.dir={folder}", "parallel.tp=2", "checkpoint.every=2", "train.eval_every=4", "train.eval_steps=1"]
    code, written = on_terminal(shared.command(*keys, procs=2), cwd=shared.folder, timeout_s=900)
    assert code == 0, written
    return screen(written), written, folder


def test_the_bar_stays_below_the_lines_and_goes(shown: tuple[list[str], str, Path]) -> None:
    lines, written, _ = shown
    assert "\x1b[2K" in written and "0/4" in written, "there was no bar"
    at = [i for i, line in enumerate(lines) if STEP.match(line)]
    assert len(at) == 4 and at == list(range(at[0], at[0] + 4)), "\n".join(lines)
    assert lines[at[-1] + 1].startswith("done: step 4/4"), "\n".join(lines)
    assert not [line for line in lines if "━" in line and "step" in line], "the bar is left on the screen"


def test_console_log_is_what_was_seen(shown: tuple[list[str], str, Path]) -> None:
    lines, _, folder = shown
    text = (folder / "console.log").read_text()
    kept = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in text.splitlines()]
    assert kept[0] == "--- toolkit 0.1.0: started at step 1, 2 processes (times in UTC)"
    assert "\x1b" not in text
    seen = lines[next(i for i, line in enumerate(lines) if line.startswith("train: ")) :]
    assert kept[kept.index(seen[0]) :] == [line for line in seen if line]


@pytest.mark.all_cells
def test_a_second_start_says_so_in_the_same_console_log(shown: tuple[list[str], str, Path], shared: Started) -> None:
    _, _, folder = shown
    before = (folder / "console.log").read_text()
    again = Started(shared.folder, folder / "config.yaml").train(procs=1, timeout_s=900)
    assert again.code == 2 and "parallel.tp=2" in again.output  # refused before it has the folder
    assert (folder / "console.log").read_text() == before
    again = Started(shared.folder, folder / "config.yaml").train("parallel.tp=1", procs=1)
    assert again.code == 0 and "nothing left to do" in again.output, again.output
    after = (folder / "console.log").read_text()
    assert after.startswith(before) and "resumed after step 4, 1 process" in after[len(before) :]
    assert "toolkit convert export" in again.output, "what a user may do with a run that is over"


def test_the_next_commands_work(shown: tuple[list[str], str, Path], shared: Started, tmp_path: Path) -> None:
    (tmp_path / "held out.txt").write_text("words that it has not seen " * 20)
    lines, _, _ = shown
    first = next(i for i, line in enumerate(lines) if line.startswith("next: "))
    commands = [line.removeprefix("next: ").strip() for line in lines[first:] if line]
    assert [command.split()[1] for command in commands] == ["evaluate", "convert", "report"]
    for command in commands:
        words = [str(tmp_path / "held out.txt") if word == "DATA" else word for word in shlex.split(command)]
        done = run_toolkit(words[1:], shared.folder)
        assert words[0] == "toolkit" and done.code == 0, done.output


@pytest.mark.all_cells
def test_a_run_that_a_hook_stopped_goes_on_as_it_says(shared: Started) -> None:
    run = shared.folder / "runs" / "hooked"
    script = (
        "import sys; from toolkit import Trainer\n"
        "Trainer(sys.argv[1], overrides={'run.dir': sys.argv[2], 'checkpoint.every': 10}, "
        "on_step=lambda s: s.stop('enough') if s.record.step == 1 else None).fit()"
    )
    done = shared.run([sys.executable, "-c", script, str(shared.config), str(run)])
    assert done.code == 0 and "not done: step 2/4 | 2 steps in " in done.output, done.output
    again = re.search(r"^go on: (toolkit train .*)$", done.output, re.M)
    assert again, done.output
    done = shared.run([sys.executable, "-m", *shlex.split(again[1])])
    assert done.code == 0 and "done: step 4/4 | 2 steps in " in done.output, done.output


def _record(step: int, *, loss: float | None = 2.0, eval_loss: float | None = None) -> StepRecord:
    figures = {"lr": 1e-3, "tokens": 1, "tokens_per_s": 1.0, "tflops_per_gpu": 1.0, "step_s": 1.0, "data_wait_s": 0.0, "memory_gib": 1.0}
    return StepRecord(step=step, loss=loss, grad_norm=1.0, mfu=None, eval_loss=eval_loss, **figures)  # type: ignore[arg-type]


def _lines(record: StepRecord | None, **changed: object) -> list[str]:
    config = parse_config({"model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}, "run": {"dir": "runs/my run"}})
    config.train.steps = 100
    facts: dict[str, object] = {
        "record": record,
        "taken": 40,
        "seconds": 90.0,
        "tokens_per_s": 12_345.0,
        "evaluated": None,
        "checkpoint": config.run.dir / "checkpoints" / "step-00000040",
        "processes": 4,
        "hosts": 1,
        **changed,
    }
    return closing_lines(config, Outcome(**facts))  # type: ignore[arg-type]


def test_a_stopped_run_says_how_to_go_on() -> None:
    first, again, *_ = _lines(_record(40), evaluated=_record(30, eval_loss=3.25))
    assert first == (
        "not done: step 40/100 | 40 steps in 1 min 30 s | loss 2.0000 | eval loss 3.2500 (step 30) | 12.3k tok/s"
        " | checkpoint runs/my run/checkpoints/step-00000040"
    )
    assert again == "go on: toolkit train 'runs/my run/config.yaml' --num-procs 4"


def test_on_a_known_gpu_it_says_what_was_expected() -> None:
    line = _lines(_record(40), device="NVIDIA H100 80GB HBM3")[1]
    assert line.startswith("expected (four of five cases): tokens/s ") and " to " in line and line.count("measured") == 2
    assert "measured below it | peak memory of the worst rank" in line  # so small a model is said to be faster than 12,345 tokens/s
    for device in ("cpu", "Voodoo 2"):
        assert _lines(_record(40), device=device) == _lines(_record(40))


def test_without_a_checkpoint_it_says_what_is_lost() -> None:
    first, again, *_ = _lines(_record(40), checkpoint=None)
    assert "no checkpoint: checkpoint.every is 0" in first and "from step 1" in again
    done = _lines(_record(100, loss=None), checkpoint=None)
    assert "loss not finite" in done[0] and not [line for line in done if "export" in line]


def test_other_starts_have_other_commands() -> None:
    assert "--hostfile HOSTFILE" in _lines(_record(40), hosts=2)[1]
    assert "start your program again" in _lines(_record(40), own_data=True)[1]
    elsewhere = _lines(_record(100), checkpoint=Path("/big disk/step-00000100"))
    assert "toolkit convert export '/big disk/step-00000100'" in elsewhere[2]


def test_other_ranks_warn_with_their_rank_and_errors_are_kept(tmp_path: Path) -> None:
    log = logging.getLogger("toolkit.train")
    log.setLevel(logging.INFO)
    with pytest.raises(TrainingError), ConsoleLog(rank=0) as console:
        log.info("before the folder is known")
        console.open(tmp_path, step=3, processes=2)
        with ConsoleLog(rank=1) as other:
            other.open(tmp_path, step=3, processes=2)
            log.info("only rank 0 says this")
            log.warning("the disk is slow")
        raise TrainingError("step 4: loss on rank 1 is not finite")
    with pytest.raises(ZeroDivisionError), ConsoleLog(rank=1) as other:
        other.open(tmp_path, step=3, processes=2)
        _ = 1 / 0
    with pytest.raises(Stopped), ConsoleLog(rank=0) as console:
        console.open(tmp_path, step=4, processes=2)
        raise Stopped("the run was stopped")
    kept = [line[20:] for line in (tmp_path / "console.log").read_text().splitlines()]
    assert kept[:5] == [
        "--- toolkit 0.1.0: resumed after step 3, 2 processes (times in UTC)",
        "before the folder is known",
        "only rank 0 says this",
        "the disk is slow",
        "rank 1: the disk is slow",
    ]
    assert kept[5] == "error: step 4: loss on rank 1 is not finite."
    assert kept[6].startswith("rank 1: Traceback") and kept[-1].startswith("--- toolkit"), kept
    assert not [h for h in (*logging.getLogger().handlers, *logging.getLogger("toolkit").handlers) if isinstance(h, ConsoleLog)]


def test_the_launcher_adds_to_its_own_run_alone(tmp_path: Path) -> None:
    log = logging.getLogger("toolkit.cluster.launch")
    path = tmp_path / "console.log"
    with launcher_log(tmp_path):
        log.error("the run was ended by SIGKILL")
    assert not path.exists(), "the ranks never had the folder"
    path.write_text("of another run\n")
    os.utime(path, (1, 1))
    with launcher_log(tmp_path):
        log.error("the run was ended by SIGKILL")
    assert path.read_text() == "of another run\n"
    with launcher_log(tmp_path):
        path.write_text("of this run\n")
        log.error("the run was ended by SIGKILL")
    assert path.read_text().endswith("the run was ended by SIGKILL\n")


def test_a_bar_shares_the_terminal_with_prints_and_other_loggers(tmp_path: Path) -> None:
    program = """
import logging, sys
from tests.train.test_screen import _record
from toolkit.train.bar import Bar
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
bar = Bar.on_terminal(steps=30, done=0)
for step in range(1, 31):
    bar.drawn = 0.0
    logging.info("line %d", step)
    print("print", step)
    sys.stderr.write(f"error {step}\\n")
    bar.step(_record(step), lambda: 90.0)
bar.close()
logging.info("after it")
"""
    code, written = on_terminal([sys.executable, "-c", program], cwd=tmp_path, timeout_s=60)
    assert code == 0, written
    assert written.count("ETA 2 min") >= 30 and "loss 2.0000" in written
    expected = [line for i in range(1, 31) for line in (f"line {i}", f"print {i}", f"error {i}")]
    assert [line for line in screen(written) if line] == [*expected, "after it"]


def test_there_is_no_bar_in_a_pipe() -> None:
    program = "from toolkit.train.bar import Bar; print(Bar.on_terminal(steps=3, done=0))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
