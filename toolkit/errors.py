"""The errors a user can cause: each says what is wrong with its values, why, and what to set."""

from __future__ import annotations

import traceback
from typing import Any


class ToolkitError(Exception):
    """Refuse something the user asked for; shown as one message, without a traceback.

    what: the setting with its value and what is wrong with it; why: the reason; fix: what to set.
    """

    exit_code = 2

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        message = what if not why else f"{what}: {why}"
        if message[-1:] not in ".!?":
            message += "."
        super().__init__(f"{message} {fix}".rstrip())


class ConfigError(ToolkitError):
    """A key, a type or a value of the run's YAML, its overrides or the DeepSpeed JSON is wrong."""


class LayoutError(ToolkitError):
    """The combination of degrees, ZeRO stage and offload cannot work, or is not proven to."""


class DataError(ToolkitError):
    """A source, a tokenizer or a prepared data set is missing, damaged or does not fit the model."""


class CheckpointError(ToolkitError):
    """A checkpoint is damaged, missing, of another run, or cannot be written."""


class ConvertError(ToolkitError):
    """A model to import or export is missing, damaged, or has something that the other side cannot hold."""


class MachineError(ToolkitError):
    """The machine lacks something the run needs: a compiler, a library, a device, a free lock."""


class TrainingError(ToolkitError):
    """The run itself went wrong: a non-finite loss or gradient, named with its step and rank."""

    exit_code = 3


class Stopped(ToolkitError):
    """A signal has ended the run after a whole step and before its last one; what was to be saved
    is saved.
    """

    exit_code = 143  # 128 + SIGTERM, which is what the launcher sends to the ranks whatever it has received


class OutOfMemory(ToolkitError):
    """A rank's memory ended: which part asked for it, on which rank, stage and layer, and what would fit."""

    exit_code = 4


def name_of(function: Any) -> str:
    """What a person calls a function that was handed in: its name, or the class of a callable object."""
    function = getattr(function, "func", function)  # of a functools.partial
    return str(getattr(function, "__qualname__", type(function).__qualname__)).split("<locals>.")[-1]


def raised_by(what: str, error: BaseException, *, rank: int | None = None, kind: type[ToolkitError] = TrainingError) -> ToolkitError:
    """The error to show for an exception in code that the user handed in; names the innermost line
    that is neither ours nor a library's.
    """
    own = str(__file__).removesuffix("errors.py")
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(own) and "site-packages" not in f.filename] or list(frames)
    return kind(
        f"{what} raised {type(error).__name__}" + (f" on rank {rank}" if rank is not None else ""),
        why=next(iter(str(error).strip().splitlines()), ""),
        fix=f"Look at {theirs[-1].filename}, line {theirs[-1].lineno}." if theirs else "",
    )


def at_least_one(option: str, value: int | None) -> None:
    """Refuse a number below 1 for an option that counts something; None leaves it open."""
    if value is not None and value < 1:
        raise ConfigError(f"{option} {value} is less than 1", fix=f"Set {option} to 1 or more.")
