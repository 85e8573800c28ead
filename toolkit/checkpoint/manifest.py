"""The manifest of a checkpoint: what it holds, the proof that it is whole, and where to look for one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from toolkit.files import FileRecord, file_sha256, sync_folder, write_durably

FORMAT = 1
NAME = "manifest.json"
LATEST = "latest"
_STEP = re.compile(r"step-(\d{8,})")


class Manifest(BaseModel):
    """A complete checkpoint; a folder without one was not finished.

    step: optimizer steps taken; consumed_samples: sequences trained on by all ranks; layout: what
    the state is cut by; identity: what a run must share to go on from here; probe: a few samples of
    the data in training order; config: the whole resolved config;
    saved_at: UTC, ISO 8601; weights_only: whole weights without optimizer states, absent where it
    is false; checksum: sha256 of all other fields.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    step: int
    consumed_samples: int
    processes: int
    layout: dict[str, Any]
    identity: dict[str, Any]
    probe: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    saved_at: str
    files: list[FileRecord]
    weights_only: bool = False
    checksum: str = ""

    def fields(self) -> dict[str, Any]:
        """What is written: without weights_only where it is false, so that earlier versions read it."""
        return self.model_dump(mode="json", exclude=None if self.weights_only else {"weights_only"})

    def digest(self) -> str:
        """The checksum that belongs to the other fields."""
        return _digest(self.fields())


def _digest(fields: dict[str, Any]) -> str:
    text = json.dumps({k: v for k, v in fields.items() if k != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder named like a checkpoint. manifest: None where it cannot be used; problem: why;
    finished: whether saving it had ended.
    """

    path: Path
    step: int
    manifest: Manifest | None
    problem: str = ""
    finished: bool = True

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.manifest.files) if self.manifest else 0


def versions() -> dict[str, str]:
    """Versions of the libraries that compute with the weights, by name."""
    return {name: version(name) for name in ("torch", "megatron-core", "deepspeed")}


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def is_folder_name(name: str) -> bool:
    return _STEP.fullmatch(name) is not None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last act of saving: from here on the checkpoint counts."""
    manifest = manifest.model_copy(update={"checksum": manifest.digest()})
    write_durably(folder / NAME, json.dumps(manifest.fields(), indent=1) + "\n")
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read and check a folder's manifest, not its files; ValueError names the file and what is
    wrong with it.
    """
    path = folder / NAME
    try:
        raw = json.loads(path.read_bytes())
    except OSError as e:
        raise ValueError(f"{path} cannot be read ({e.strerror})") from None
    except ValueError:
        raise ValueError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is damaged: it holds no fields")
    if raw.get("format") != FORMAT:
        # checked before the checksum, which another version may compute in another way
        raise ValueError(f"{path} has format {raw.get('format')!r}, and this version reads format {FORMAT}")
    if raw.get("checksum") != _digest(raw):
        raise ValueError(f"{path} is damaged: its content does not match its checksum")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as e:
        raise ValueError(f"{path} is damaged: {e.errors()[0]['msg']}") from None


def discover(folder: Path) -> list[CheckpointFolder]:
    """Every checkpoint in a folder, newest first, whole or not; found by looking, not by the file `latest`.

    Sizes are checked here, checksums in verify_files().
    """
    folders = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if not (match := _STEP.fullmatch(path.name)) or not path.is_dir():
            continue
        folders.append(look_at(path, step=int(match[1])))
    return sorted(folders, key=lambda f: f.step, reverse=True)


def look_at(path: Path, *, step: int | None = None) -> CheckpointFolder:
    """One checkpoint folder, whole or not, its files' sizes checked; step: the step it must be of."""
    if not (path / NAME).exists():
        return CheckpointFolder(path, step or 0, None, f"{path / NAME} is missing: saving was cut off", finished=False)
    try:
        manifest = read_manifest(path)
    except ValueError as e:
        return CheckpointFolder(path, step or 0, None, str(e))
    if step is not None and manifest.step != step:
        return CheckpointFolder(path, step, None, f"{path / NAME} is of step {manifest.step}")
    problem = next((p for f in manifest.files if (p := _wrong_size(path, f))), "")
    return CheckpointFolder(path, manifest.step, None if problem else manifest, problem)


def _wrong_size(folder: Path, record: FileRecord) -> str:
    path = folder / record.name
    try:
        size = path.stat().st_size
    except OSError as e:
        return f"{path} is missing" if isinstance(e, FileNotFoundError) else f"{path} cannot be read ({e.strerror})"
    return "" if size == record.bytes else f"{path} has {size} bytes, and its manifest says {record.bytes}"


def verify_files(folder: Path, records: Iterable[FileRecord], *, progress: Callable[[int], None] = lambda _: None) -> str:
    """Read files and compare their checksums; return the first problem as text, "" where there is none.

    progress: called with the number of bytes read since its last call.
    """
    for record in records:
        path = folder / record.name
        if problem := _wrong_size(folder, record):
            return problem
        try:
            damaged = file_sha256(path, progress=progress) != record.sha256
        except OSError as e:
            return f"{path} cannot be read ({e.strerror})"
        if damaged:
            return f"{path} is damaged: it does not match its checksum"
    return ""
