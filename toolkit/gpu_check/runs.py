"""How a check trains: in its own process, or in processes of their own as a user starts them."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from toolkit.errors import ToolkitError
from toolkit.gpu_check.rows import Row
from toolkit.gpu_check.setting import Setting
from toolkit.runfolder.metrics import read_metrics
from toolkit.trainer import Trainer

log = logging.getLogger("toolkit.gpu_check")

Say = Callable[[Row], None]


def train(raw: Mapping[str, Any], **plugged_in: Any) -> list[dict[str, Any]]:
    """Train in this process and return the run's records, one a step. plugged_in: hooks as Trainer
    takes them.
    """
    try:
        Trainer(raw, **plugged_in).fit()
    finally:
        free()
    return read_metrics(Path(raw["run"]["dir"]))


def free() -> None:
    """Give back what a run has left: the next one's peak is then its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attempt(name: str, say: Say, measure: Callable[[], Row]) -> None:
    """Say one row; an error is a failed row, and the check goes on, unless the GPU itself no longer
    answers.
    """
    try:
        say(measure())
    except ToolkitError as error:
        say(Row(name=name, verdict="fail", note=str(error)))
    except Exception as error:
        log.error("%s", traceback.format_exc())
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = (str(error).strip().splitlines() or [""])[0][:300]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        say(Row(name=name, verdict="fail", note=f"{type(error).__name__}: {message} ({where})"))
        if "CUDA error" in str(error):
            raise


def write_yaml(setting: Setting, raw: Mapping[str, Any]) -> Path:
    """The YAML of a run that a program of its own will read."""
    path = setting.folder / f"{Path(raw['run']['dir']).name}.yaml"
    path.write_text(yaml.safe_dump(dict(raw)))
    return path


def program(setting: Setting, name: str, arguments: Sequence[str | Path], **environ: str) -> tuple[int, str]:
    """Run Python with arguments; its exit code and all that it wrote, which also stays in the
    folder for a check that hangs.
    """
    output = setting.folder / "logs" / f"{name}.log"
    with output.open("w") as file:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environ},
            check=False,
        )
    return done.returncode, output.read_text(errors="replace")
