"""What a report shows of a run folder: metrics.jsonl, profile.json, config.yaml, tune.json;
whatever is damaged is named.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from toolkit.errors import DataError
from toolkit.runfolder.files import CONFIG, METRICS, read_ranks
from toolkit.runfolder.profile import read_profile
from toolkit.runfolder.recoveries import Recovery, read_recoveries

TUNE = "tune.json"
TUNE_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """One run as found on disk; a part that is not there is empty, and notes say what a reader
    should know of it.
    """

    name: str
    path: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    profile: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    tune: dict[str, Any] | None = None
    recoveries: tuple[Recovery, ...] = ()
    ranks: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


def read_runs(paths: list[Path]) -> list[RunFolder]:
    """All runs of a report, under the shortest names that tell them apart; raises DataError naming
    the folder, file and line.
    """
    resolved = [Path(path).resolve() for path in dict.fromkeys(paths)]
    names = [path.name for path in resolved]
    return [
        _read(path, given, name if names.count(name) == 1 else f"{path.parent.name}/{name}")
        for path, given, name in zip(resolved, dict.fromkeys(paths), names, strict=True)
    ]


def _read(path: Path, given: Path, name: str) -> RunFolder:
    if not path.exists():
        raise DataError(f"{given} does not exist", fix="Name a run folder (run.dir of its config).")
    if path.is_file():
        if path.suffix != ".json":
            raise DataError(f"{given} is a file", why="a report is made of run folders and tune.json files", fix="Name the run's folder.")
        return RunFolder(name=name, path=path, tune=_tune(path))
    metrics, notes = _metrics(path / METRICS)
    run = RunFolder(
        name=name,
        path=path,
        metrics=metrics,
        profile=read_profile(path),
        config=_config(path),
        tune=_tune(path / TUNE) if (path / TUNE).exists() else None,
        recoveries=tuple(read_recoveries(path)),
        ranks=read_ranks(path),
        notes=tuple(notes),
    )
    if not (run.metrics or run.profile or run.tune):
        raise DataError(
            f"{given} holds no metrics.jsonl, profile.json or tune.json",
            why="there is nothing to show",
            fix="Name a folder that toolkit train, profile or tune has written to.",
        )
    return run


def _metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Records by line. A last line without its end is what a killed run leaves and is passed over;
    any other damage is an error.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise DataError(f"{path} cannot be read", why=str(error), fix="Check the file's permissions.") from None
    records: dict[int, dict[str, Any]] = {}
    notes: list[str] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = record["step"]
            if isinstance(step, bool) or not isinstance(step, int):
                raise TypeError("step is not a whole number")
            for key, value in record.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{key} is {value}")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                notes.append(f"line {number} of metrics.jsonl is cut off, as a killed run leaves it; it is passed over.")
                continue
            reason = "it has no step" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{path}, line {number}, is damaged",
                why=f"{reason}: {_start(line)}",
                fix="Remove the line, or take the file from a backup.",
            ) from None
        records[step] = record
    return [records[step] for step in sorted(records)], notes


def _start(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", errors="replace")) + (" …" if len(line) > 60 else "")


def _config(folder: Path) -> dict[str, Any] | None:
    for name in (CONFIG, "run.yaml"):
        path = folder / name
        if not path.exists():
            continue
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            raise DataError(f"{path} is damaged", why=str(error).splitlines()[0], fix="Remove it, or restore it.") from None
        return values if isinstance(values, dict) else None
    return None


def _tune(path: Path) -> dict[str, Any]:
    try:
        ranking = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged", why=str(error), fix="Run toolkit tune again.") from None
    plans = ranking.get("plans") if isinstance(ranking, dict) else None
    if not isinstance(plans, list) or ranking.get("format") != TUNE_FORMAT:
        raise DataError(f"{path} is not a ranking that toolkit tune wrote in format {TUNE_FORMAT}", fix="Run toolkit tune again.")
    figure = (int, float)
    wanted: dict[str, Any] = {"layout": dict, "tokens_per_s": figure, "step_s": figure, "peak_device_gib": figure}
    for number, plan in enumerate(plans, start=1):
        lacking = [key for key, kind in wanted.items() if not isinstance(plan, dict) or not isinstance(plan.get(key), kind)]
        if lacking:
            raise DataError(f"{path}, plan {number}, lacks {', '.join(lacking)}", why="it is damaged", fix="Run toolkit tune again.")
    return dict(ranking)
