"""RUN/console.log: what a run says on the screen, kept beside its metrics, each line with its time
in UTC.

It holds rank 0's lines, warnings of other ranks with their rank, and what ended the run. It holds
nothing else: no environment, no command line. The ranks write it themselves, so no launcher's prefix
stands before the lines.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from toolkit import __version__
from toolkit.errors import Stopped, ToolkitError
from toolkit.runfolder.files import CONSOLE

_MOST_HELD = 1000  # lines said before the run has its folder


class ConsoleLog(logging.Handler):
    """Copies a rank's lines to console.log, from `with` to its end.

    Lines said before open() are held until then: the folder may be another run's.
    """

    def __init__(self, *, rank: int) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        self.rank = rank
        self.folder: Path | None = None
        self.file: IO[str] | None = None
        self.held: list[str] = []
        formatter = logging.Formatter("%(asctime)s " + (f"rank {rank}: " if rank else "") + "%(message)s", "%Y-%m-%d %H:%M:%S")
        formatter.converter = time.gmtime
        self.setFormatter(formatter)

    def __enter__(self) -> ConsoleLog:
        # a handler of the root logger would turn a later logging.basicConfig() of the user's script into nothing
        self.logger = logging.getLogger() if logging.getLogger().handlers else logging.getLogger("toolkit")
        self.logger.addHandler(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, ToolkitError):
            # raised on all ranks alike; that the run was stopped has been said
            if self.rank == 0 and not isinstance(error, Stopped):
                self._say(f"error: {error}")
        elif error is not None:
            self._say("".join(traceback.format_exception(error)).rstrip())
        self.logger.removeHandler(self)
        self.close()

    def open(self, folder: Path, *, step: int, processes: int) -> None:
        """Write from here on to the run's folder, which no other run has; step: those already taken."""
        self.folder = folder
        if self.rank == 0:
            start = f"resumed after step {step}" if step else "started at step 1"
            self._say(f"--- toolkit {__version__}: {start}, {processes} process{'' if processes == 1 else 'es'} (times in UTC)", first=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or hold it."""
        self._write(self.format(record))

    def close(self) -> None:
        """End the file; lines that were held and never written are gone."""
        if self.file is not None:
            self.file.close()
            self.file = None
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


@contextmanager
def launcher_log(folder: Path) -> Iterator[None]:
    """Add what the process that starts the ranks has to say of them: signals, and a rank that was
    killed. It writes only where its ranks have written since.
    """
    started = time.time()
    path = folder / CONSOLE
    with ConsoleLog(rank=0) as log:
        log.setLevel(logging.WARNING)
        try:
            yield
        finally:
            if log.held and path.exists() and path.stat().st_mtime >= started:
                log.folder = folder
                log._write(None)
