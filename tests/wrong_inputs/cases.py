"""The corpus of wrong inputs: what a user types, in inputs/*.yaml, and what the command answers, in
messages.json.

`python -m tests.wrong_inputs.cases` writes the answers anew; read what has changed before it is committed.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import yaml

from tests.train.conftest import TINY

HERE = Path(__file__).parent
MESSAGES = HERE / "messages.json"
DEADLINE_S = 30  # after which a command counts as one that hangs


class TooLong(BaseException):
    """A command that does not answer; no handler of errors in it may take this for one."""


def warm_up() -> None:
    """Import once what some cases need, so that each of them answers within its deadline on a busy
    machine.
    """
    import datasets  # noqa: F401
    import transformers  # noqa: F401

    import toolkit.convert.importing
    import toolkit.data.samples  # noqa: F401


@dataclass(frozen=True)
class Case:
    """One wrong input. files: by name, text or the content of a JSON."""

    group: str
    name: str
    words: list[str]
    files: dict[str, Any] = field(default_factory=dict)
    encoding: str = "utf-8"


def cases() -> list[Case]:
    """All of them, in the order of the files."""
    found = []
    for path in sorted((HERE / "inputs").glob("*.yaml")):
        for name, body in yaml.safe_load(path.read_text()).items():
            body = {"run": body} if isinstance(body, str) else body
            files, encoding = body.get("files", {}), body.get("encoding", "utf-8")
            found.append(Case(group=path.stem, name=name, words=shlex.split(body["run"]), files=files, encoding=encoding))
    return found


def answers() -> dict[str, dict[str, Any]]:
    """What the command is to answer, by the case's name: exit code and message."""
    answers: dict[str, dict[str, Any]] = json.loads(MESSAGES.read_text())
    return answers


def lay_out(case: Case, folder: Path) -> None:
    """Make the folder that a case starts in: run.yaml, text/ and its own files, all of the same old time."""
    (folder / "text").mkdir()
    for number in range(5):
        (folder / "text" / f"a{number}.txt").write_text("to be or not to be " * 200)
    (folder / "run.yaml").write_text(yaml.safe_dump({**TINY, "data": {"source": "text", "workers": 0}}))
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding=case.encoding)
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))  # prepared data is named by a digest of times


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Run the command of a case in this process, in its folder; returns exit code and message."""
    from toolkit.cli import main

    error, output = io.StringIO(), io.StringIO()
    code: Any = "none"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_in_folder(folder))
        stack.enter_context(_deadline(case.name))
        stack.enter_context(patch.object(sys, "argv", ["toolkit", *case.words]))
        stack.enter_context(contextlib.redirect_stderr(error))
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(_own_logging())
        try:
            main()
        except SystemExit as end:
            code = end.code
    return {"code": code, "message": plain(error.getvalue(), folder)}


def plain(message: str, folder: Path) -> str:
    """A message on one line, without a terminal's boxes and this test's folder."""
    text = re.sub(r"[╭╮╰╯│─]+", " ", message.replace(str(folder), "HERE"))
    return " ".join(text.split())


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "-1", "TERMINAL_WIDTH": "200", "COLUMNS": "200", "NO_COLOR": "1"}):
            yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _deadline(name: str) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"{name}: no answer within {DEADLINE_S} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(DEADLINE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _own_logging() -> Iterator[None]:
    """The command sets up logging for its process: this one is given back its own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level


def main() -> None:
    """Write the answers of all cases as they are now."""
    found = {}
    warm_up()
    for case in cases():
        with tempfile.TemporaryDirectory() as folder:
            lay_out(case, Path(folder))
            try:
                found[case.name] = run(case, Path(folder))
            except (Exception, TooLong) as e:
                sys.exit(f"{case.name}: {type(e).__name__}: {e}")
    MESSAGES.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
