"""RUN/console.log: what a run says on the screen, kept beside its metrics, each line with its time
in UTC; and RUN/logs/rank-NNNNN.log, all that one rank says.

console.log holds rank 0's lines, warnings of other ranks with their rank and host, and what ended
the run: the first cause, and none of the errors of ranks that only lost it. It holds nothing else:
no environment, no command line. The ranks write it themselves, so no launcher's prefix stands before
the lines. A rank's own file is cut at RANK_BYTES, and RANK_FILES older ones are kept.
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import IO

from toolkit import __version__
from toolkit.cluster.environment import hosts
from toolkit.cluster.stalls import REQUEUE
from toolkit.errors import OutOfMemory, Stopped, ToolkitError
from toolkit.redact import Redacted
from toolkit.runfolder.files import CONSOLE, LOGS, METRICS
from toolkit.train.failures import failure_lines, note

_MOST_HELD = 1000  # lines said before the run has its folder
RANK_BYTES, RANK_FILES = 16 << 20, 3
EXPLAINED = (0, 2, 3, 4, REQUEUE, 130, 143)  # exit codes after which the user knows what to do

logger = logging.getLogger(__name__)


def rank_name(rank: int) -> str:
    """A rank as lines name it: with its host where the run has several."""
    return f"rank {rank} on {socket.gethostname()}" if hosts() > 1 else f"rank {rank}"


def was_told(error: BaseException) -> bool:
    """Whether an error need not be shown again: another rank has said the cause, and this rank's
    own file has its traceback.
    """
    return bool(getattr(error, "toolkit_was_told", False))


class ConsoleLog(logging.Handler):
    """Copies a rank's lines to console.log, from `with` to its end.

    Lines said before open() are held until then: the folder may be another run's.
    """

    def __init__(self, *, rank: int) -> None:
        super().__init__(logging.INFO)
        self.rank = rank
        self.least = logging.INFO if rank == 0 else logging.WARNING  # for console.log
        self.own: RotatingFileHandler | None = None
        self.early: list[logging.LogRecord] = []  # for the rank's own file
        self.folder: Path | None = None
        self.file: IO[str] | None = None
        self.held: list[str] = []
        prefix = f"{rank_name(rank).replace('%', '%%')}: " if rank else ""
        self.setFormatter(_in_utc(f"%(asctime)s {prefix}%(message)s"))

    def __enter__(self) -> ConsoleLog:
        # a handler of the root logger would turn a later logging.basicConfig() of the user's script
        # into nothing
        self.logger = logging.getLogger() if logging.getLogger().handlers else logging.getLogger("toolkit")
        self.logger.addHandler(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, ToolkitError):
            if isinstance(error, OutOfMemory):
                note(self.folder, error, rank=self.rank)  # before this rank leaves, so that the others know why
            # raised on all ranks alike, but for the end of one's memory; that the run was stopped
            # has been said
            if isinstance(error, OutOfMemory) or (self.rank == 0 and not isinstance(error, Stopped)):
                self._say(f"error: {error}")
        elif isinstance(error, Exception):
            words = "".join(traceback.format_exception(error)).rstrip()
            self._own(logging.makeLogRecord({"msg": words.replace("%", "%%"), "levelname": "ERROR", "levelno": logging.ERROR}))
            if note(self.folder, error, rank=self.rank):
                self._say(words)
            else:
                error.toolkit_was_told = True  # type: ignore[attr-defined]
        elif error is not None and not isinstance(error, SystemExit):
            self._say("".join(traceback.format_exception(error)).rstrip())
        self.logger.removeHandler(self)
        self.close()

    def open(self, folder: Path, *, step: int, processes: int) -> None:
        """Write from here on to the run's folder, which no other run has; step: those already taken."""
        self.folder = folder
        self._open_own(processes)
        if self.rank == 0:
            start = f"resumed after step {step}" if step else "started at step 1"
            self._say(f"--- toolkit {__version__}: {start}, {processes} process{'' if processes == 1 else 'es'} (times in UTC)", first=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or hold it."""
        self._own(record)
        if record.levelno >= self.least:
            self._write(self.format(record))

    def _open_own(self, processes: int) -> None:
        assert self.folder is not None
        if self.rank and not self.folder.is_dir():
            return  # as below
        with suppress(OSError):
            (self.folder / LOGS).mkdir(parents=True, exist_ok=True)
            path = self.folder / LOGS / f"rank-{self.rank:05}.log"
            self.own = RotatingFileHandler(path, maxBytes=RANK_BYTES, backupCount=RANK_FILES, encoding="utf-8")
            self.own.setFormatter(_in_utc("%(asctime)s %(levelname)s %(message)s"))
            self.own.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk must not end a run
            start = f"--- toolkit {__version__}: rank {self.rank} of {processes} on {socket.gethostname()}, process {os.getpid()}"
            for record in (logging.makeLogRecord({"msg": start, "levelname": "INFO"}), *self.early):
                self.own.emit(record)
        self.early.clear()

    def _own(self, record: logging.LogRecord) -> None:
        if self.own is not None:
            self.own.emit(record)
        elif self.folder is None and len(self.early) < _MOST_HELD:
            self.early.append(record)

    def close(self) -> None:
        """End the file; lines that were held and never written are gone."""
        if self.file is not None:
            self.file.close()
            self.file = None
        if self.own is not None:
            self.own.close()
            self.own = None
        self.folder = None
        super().close()

    def _say(self, text: str, *, first: bool = False) -> None:
        line = self.format(logging.makeLogRecord({"msg": text}))
        if first:
            self.held.insert(0, line)
            self._write(None)
        else:
            self._write(line)

    def _write(self, line: str | None) -> None:
        if line is not None and len(self.held) < _MOST_HELD:
            self.held.append(line)
        # on other hosts the folder may not be there: their ranks then warn on the screen alone
        if self.folder is None or not self.held or (self.rank and not self.folder.is_dir()):
            return
        with suppress(OSError):  # a full disk must not end a run that can still train
            if self.file is None:
                self.file = (self.folder / CONSOLE).open("a", encoding="utf-8", buffering=1)
            self.file.write("".join(f"{one}\n" for one in self.held))
        self.held.clear()


def watched(run: Callable[[], int], *, folder: Path, doctor: Sequence[str]) -> int:
    """Start ranks by `run` and return their exit code, with last words for a run that failed: who
    failed first and, where no step was taken, the command that looks at the hosts.
    """
    with launcher_log(folder):
        started = time.time()
        code = run()
        metrics = folder / METRICS
        stepped = metrics.exists() and metrics.stat().st_mtime >= started
        if code not in EXPLAINED and not stepped:
            logger.error("no step was taken; this looks at the hosts: %s", shlex.join(doctor))
        return code


def _in_utc(form: str) -> logging.Formatter:
    formatter = logging.Formatter(form, "%Y-%m-%d %H:%M:%S")
    formatter.converter = time.gmtime
    return Redacted(formatter)


@contextmanager
def launcher_log(folder: Path) -> Iterator[None]:
    """Add what the process that starts the ranks has to say of them: signals, and a rank that was
    killed, and which rank failed first. It writes only where its ranks have written since.
    """
    started = time.time()
    path = folder / CONSOLE
    with ConsoleLog(rank=0) as log:
        log.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for line in failure_lines(folder, since=started):
                logger.error("%s", line)
            if log.held and path.exists() and path.stat().st_mtime >= started:
                log.folder = folder
                log._write(None)
