"""Which rank failed first: each failing rank notes it in the run folder, so that one cause is shown
and not its 63 echoes.

When one rank fails, the others lose their connection to it and fail too. Such an echo says nothing
that the user can act on. All tracebacks are in the ranks' own files (RUN/logs).
"""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from toolkit.redact import redact
from toolkit.runfolder.files import LOGS

FAILURES = "failures.jsonl"
# what gloo, NCCL and the store say where another rank or its host has gone
LOST_PEER = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL communicator was aborted"),
    *("remote process exited", "ncclRemoteError", "ncclSystemError", "failed to recv, got 0 bytes", "Connection was likely closed"),
    *("peer is no longer", "Read error", "Application timeout caused pair closure"),
)
NAMED = 8  # ranks named in one line


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A rank's end by an error. echo: it only says that another rank has gone; time: seconds since
    the epoch, on its own clock.
    """

    time: float
    rank: int
    ranks: int
    host: str
    echo: bool
    error: str


def is_echo(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    return not isinstance(error, OSError) and any(words in str(error) for words in LOST_PEER)


def note(folder: Path | None, error: BaseException, *, rank: int) -> bool:
    """Note this rank's error in the run folder; returns whether the user must see it, since no
    other rank has said the cause.

    Without a folder, or where this host does not see it, every cause is to be seen.
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    text = redact("".join(traceback.format_exception_only(error)).strip())[:2000]
    mine = Failure(time=time.time(), rank=rank, ranks=ranks, host=socket.gethostname(), echo=is_echo(error), error=text)
    if folder is None or not folder.is_dir():
        return True
    path = folder / LOGS / FAILURES
    try:
        path.parent.mkdir(exist_ok=True)
        # one write to a file opened for appending: lines of several ranks do not mix
        with path.open("ab", buffering=0) as file:
            file.write((json.dumps(asdict(mine)) + "\n").encode())
    except OSError:
        return True
    # a record from before this process began is of an earlier start in the same folder
    told = failures(folder, since=psutil.Process().create_time())
    first = next((f for f in told if not f.echo), told[0] if told else mine)
    return (first.rank, first.time) == (mine.rank, mine.time)


def failures(folder: Path, *, since: float) -> list[Failure]:
    """What ranks have noted since a time, in the order in which they wrote it."""
    found = []
    with suppress(OSError):
        for line in (folder / LOGS / FAILURES).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError):  # a disk that was full has cut a line
                failure = Failure(**json.loads(line))
                if failure.time >= since:
                    found.append(failure)
    return found


def failure_lines(folder: Path, *, since: float) -> list[str]:
    """For the process that started the ranks: who failed first, in one line, and how many others
    after it; nothing where nobody did.
    """
    told = failures(folder, since=since)
    if not told:
        return []
    causes = [f for f in told if not f.echo]
    others = len({f.rank for f in told}) - 1
    where = f"each rank's own words: {folder / LOGS}"
    if causes:
        first = causes[0]
        more = f"; {others} other rank{'s' * (others > 1)} ended after it" if others else ""
        return [f"first to fail was rank {first.rank} on {first.host}: {first.error.splitlines()[0]}{more} ({where})"]
    silent = sorted(set(range(told[0].ranks)) - {f.rank for f in told})
    lost = f"{others + 1} rank{'s' * (others > 0)} lost {'another' if len(silent) == 1 else 'others'}"
    return [f"{lost} without a word: killed, or the host or its link is gone; not heard from: {_named(silent)} ({where})"]


def _named(ranks: Sequence[int]) -> str:
    if not ranks:
        return "nobody in particular"
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:NAMED]))}{more}"
