"""Where text comes from: the built-in corpus, local files, or a Hugging Face dataset; always in the
same order.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolkit.config.explain import nearest
from toolkit.config.schema import BUILT_IN
from toolkit.errors import DataError

log = logging.getLogger(__name__)

HUB_TIMEOUT_S = 10.0
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
# Tests and vendored tools are not typical text; the last two differ between builds of one Python version.
_SKIP_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
_SKIP_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class Source:
    """One corpus, and a fingerprint that changes when its text may have.

    files: in reading order (empty for a hub dataset); size: bytes on disk, None when unknown.
    """

    spec: str
    kind: Literal["built-in", "files", "hub"]
    text_key: str
    fingerprint: str
    files: tuple[Path, ...] = ()
    size: int | None = None

    def documents(self) -> Iterator[str]:
        """Yield every document's text, in an order that depends on the source alone; empty ones included."""
        if self.kind == "hub":
            yield from _hub_rows(self.spec, text_key=self.text_key)
        for path in self.files:
            yield from _file_documents(path, text_key=self.text_key, plain=self.kind == "built-in")


def is_source_path(spec: str) -> bool:
    """Whether the spec is meant as a path: it exists, looks like one, or ends like a text file."""
    path = Path(spec).expanduser()
    return path.exists() or spec.startswith(("/", "./", "../", "~")) or spec.endswith(SUFFIXES)


def refuse_mistyped(spec: str, *, key: str, fix: str) -> None:
    """Refuse a name that could be a hub's `owner/name`, and is far more like a path here: its
    folder is there, and one in it is near.

    The hub would be asked for it again and again, for half a minute without a network. Raises
    DataError with the near path.
    """
    parent, slash, last = spec.rpartition("/")
    if not slash or not Path(parent).is_dir():
        return
    there = {p.name.removesuffix(".idx").removesuffix(".bin") for p in Path(parent).iterdir() if not p.name.startswith(".")}
    if near := nearest(last, there):
        raise DataError(f"{key}={spec} is not found", fix=f"Did you mean {parent}/{near}? {fix}")


def open_source(spec: str, *, text_key: str = "text") -> Source:
    """Resolve a source spec without reading its text.

    spec: `python-stdlib`; a .txt/.jsonl/.jsonl.gz/.parquet file or a folder of them; else a hub
    name, `name[:config[:split]]`. Raises DataError when the path does not exist or holds nothing
    readable.
    """
    if spec == BUILT_IN:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = _stdlib_files(root)
        return _of_files(spec, files, root=root, kind="built-in", text_key=text_key, salt=f"python {platform.python_version()}")
    if not is_source_path(spec):
        if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?(:[^:]*){0,2}", spec):
            raise DataError(f"data.source={spec}", why="no such file, and not a dataset's name", fix=_HOW_TO_SET)
        refuse_mistyped(spec, key="data.source", fix=_HOW_TO_SET)
        return Source(spec=spec, kind="hub", text_key=text_key, fingerprint=_digest("hub", spec, text_key))
    path = Path(spec).expanduser()
    if not path.exists():
        refuse_mistyped(spec, key="data.source", fix=_HOW_TO_SET)
        raise DataError(f"data.source={spec}", why="no such file or folder", fix=_HOW_TO_SET)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"data.source={spec}", why=f"the name does not end in {', '.join(SUFFIXES)}", fix=_HOW_TO_SET)
        return _of_files(spec, [path], root=path.parent, kind="files", text_key=text_key)
    files = [p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file()]
    files.sort(key=lambda p: p.relative_to(path).as_posix())
    if not files:
        raise DataError(f"data.source={spec}", why=f"the folder holds no file ending in {', '.join(SUFFIXES)}", fix=_HOW_TO_SET)
    return _of_files(spec, files, root=path, kind="files", text_key=text_key)


_HOW_TO_SET = (
    f"Set data.source to {BUILT_IN}, to a {'/'.join(s[1:] for s in SUFFIXES)} file or a folder of them, "
    "to a prepared prefix, or to the name of a Hugging Face dataset."
)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _of_files(spec: str, files: list[Path], *, root: Path, kind: Literal["built-in", "files"], text_key: str, salt: str = "") -> Source:
    rows: list[tuple[object, ...]] = []
    total = 0
    for path in files:
        stat = path.stat()
        total += stat.st_size
        # The standard library's times differ between installations of the same text.
        rows.append((path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns if kind == "files" else 0))
    key = text_key if kind == "files" else ""
    return Source(spec=spec, kind=kind, text_key=text_key, fingerprint=_digest(kind, salt, key, rows), files=tuple(files), size=total)


def _stdlib_files(root: Path) -> list[Path]:
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIP_FOLDERS]
        files += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith(_SKIP_FILES)]
    if not files:
        raise DataError(
            f"data.source={BUILT_IN}",
            why=f"this Python keeps no .py files in {root}",
            fix="Set data.source to a file, a folder or a hub name.",
        )
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def _clean(text: str) -> str:
    """The text itself, or with lone surrogates (which no encoding has bytes for) replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _file_documents(path: Path, *, text_key: str, plain: bool) -> Iterator[str]:
    if plain or path.name.endswith(".txt"):
        # Read here: Hugging Face's text loader would turn \r\n into \n.
        try:
            yield path.read_bytes().decode("utf-8", "replace")
        except OSError as e:
            raise DataError(f"{path} cannot be read", why=str(e), fix="Make the file readable, or leave it out.") from None
        return
    if path.name.endswith(".parquet"):
        rows = _load("parquet", name=str(path), data_files=[glob.escape(str(path))])
        yield from _texts(rows, name=str(path), text_key=text_key)
        return
    # Line by line, parsed here: Hugging Face's JSON loader infers one schema, and fails when a
    # later row has another key.
    lines = _load("text", name=str(path), data_files=[glob.escape(str(path))], encoding_errors="replace")
    yield from _texts(_parsed(lines, name=str(path)), name=str(path), text_key=text_key)


def _parsed(lines: Iterator[dict[str, Any]], *, name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line["text"].strip():
            continue
        try:
            row = json.loads(line["text"])
        except ValueError as e:
            raise DataError(f"{name}, line {number} is not JSON", why=str(e), fix="Correct or remove the line.") from None
        if not isinstance(row, dict):
            raise DataError(
                f"{name}, line {number} is a JSON {type(row).__name__}",
                why="each line must be an object",
                fix='Wrap the text: {"text": …}.',
            )
        yield row


def _hub_rows(spec: str, *, text_key: str) -> Iterator[str]:
    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    rows = _load(name, name=spec, config=config or None, split=split or "train")
    yield from _texts(rows, name=spec, text_key=text_key)


def _load(path: str, *, name: str, config: str | None = None, split: str = "train", **options: Any) -> Iterator[dict[str, Any]]:
    """Rows of Hugging Face `datasets`, streamed; every failure becomes a DataError that names the source."""
    import datasets

    if "data_files" not in options:
        _ask_hub(path)
    try:
        yield from datasets.load_dataset(path, config, split=split, streaming=True, **options)
    except DataError:
        raise
    except Exception as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        hint = (
            "Check the file; it may be damaged or not what its name says."
            if "data_files" in options
            else "Check the name (name:config:split), set HF_TOKEN for a gated one, connect to the network once so that it is cached, "
            "or set data.source to a local file or folder."
        )
        raise DataError(f"data.source={name} could not be read", why=first, fix=hint) from None


def _ask_hub(name: str) -> None:
    """Ask the hub once for a data set: where it does not answer, what is cached has to do, without
    half a minute of retries.
    """
    import datasets
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except huggingface_hub.errors.HfHubHTTPError:
        return  # it answers: that it lacks the data set, or keeps it to some, is said when it is loaded
    except Exception:
        log.info("the Hugging Face hub does not answer: looking for %s in the cache", name)
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _texts(rows: Iterator[dict[str, Any]], *, name: str, text_key: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        if text_key not in row:
            keys = ", ".join(sorted(map(str, row))[:8]) or "none"
            raise DataError(
                f"{name}, row {number} has no field {text_key!r}",
                why=f"its fields are: {keys}",
                fix="Set data.text_key to the field that holds the text.",
            )
        text = row[text_key]
        if text is None:
            text = ""
        if not isinstance(text, str):
            raise DataError(
                f"{name}, row {number}: field {text_key!r} is of type {type(text).__name__}",
                why="only text can be tokenized",
                fix="Set data.text_key to the field that holds the text.",
            )
        yield _clean(text)
