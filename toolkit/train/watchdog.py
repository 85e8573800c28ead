"""Ends a run that makes no progress, after every rank has said what it waits in.

A thread of each rank looks at a counter that the training loop moves on; a step costs it nothing.
What a rank waits in is read from its Python stack, and from the flight recorder in which torch notes
every collective as it is issued, so nothing is wrapped and the device is not waited for.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from toolkit.cluster.environment import SUPERVISED
from toolkit.cluster.stalls import REQUEUE, STALLED, SUMMARY, Wait, call_all, is_called, read_reports, summary, write_report
from toolkit.parallel.agree import everywhere
from toolkit.parallel.group_names import group_names
from toolkit.parallel.layout import Layout
from toolkit.runfolder.files import CONFIG
from toolkit.train import guard

log = logging.getLogger("toolkit.train")

FIRST_STEP = 3  # times longer that the first step may take: kernels compile, files are read
ANSWER_S = 10.0  # for ranks to notice the call and write their stacks; less where the user wants to know sooner
SAMPLE_S = 0.05  # between two looks at what the rank does
DISTRIBUTED = ("torch/distributed/distributed_c10d.py", "pipeline_parallel/p2p_communication.py")
ROOM = f"{os.sep}toolkit{os.sep}"


@dataclass
class Progress:
    """What the training loop tells of itself. step: the one it is in; beats: grows whenever
    something has been done.
    """

    step: int = 0
    beats: int = 0


@dataclass(frozen=True, kw_only=True)
class Party:
    """The ranks of one start of a run. hosts: of each rank; folder: where their reports meet;
    shared: whether all see it.
    """

    hosts: tuple[str, ...]
    folder: Path
    shared: bool

    @classmethod
    def of(cls, run: Path) -> Party:
        """All ranks call it, once rank 0 has made the run's folder."""
        started = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
        found = everywhere(lambda: (socket.gethostname(), (run / CONFIG).exists(), started))
        return cls(hosts=tuple(host for host, _, _ in found), folder=run / STALLED / found[0][2], shared=all(seen for _, seen, _ in found))


class Watchdog:
    """Watches this rank; every rank of a run makes one.

    seconds: without progress, after which the run ends with exit code 75. Where the run's folder is
    not shared each rank speaks for itself.
    """

    def __init__(self, progress: Progress, party: Party, *, seconds: float, rank: int, layout: Layout) -> None:
        self.progress, self.party, self.seconds, self.rank, self.layout = progress, party, seconds, rank, layout
        self.answer_s = min(ANSWER_S, seconds)
        self.watched = threading.get_ident()
        self.ended = threading.Event()
        self.end: Callable[[int], None] = os._exit  # the main thread may never return to Python
        # a rank that is alone keeps nobody waiting, unless it is the last one of an elastic run
        waited_for = len(party.hosts) > 1 or SUPERVISED in os.environ
        self.guard = guard.start(limit_s=2 * seconds + self.answer_s) if waited_for else None
        self.busy_s, self.waiting_s = 0.0, 0.0
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop watching; what follows may take as long as it likes."""
        self.ended.set()
        self.thread.join()
        guard.stop(self.guard)

    def _watch(self) -> None:
        poll_s = min(1.0, self.seconds / 4)
        sample_s = min(SAMPLE_S, poll_s)
        seen, idle, before, polled = self.progress.beats, 0.0, time.monotonic(), 0.0
        while not self.ended.wait(sample_s):
            now = time.monotonic()
            past, before = now - before, now
            self._sample(past)
            # a process that was stopped for a while and goes on has not been idle for all of it
            idle += min(past, 2 * poll_s)
            polled += past
            if self.progress.beats != seen:
                seen, idle = self.progress.beats, 0.0
            if polled < poll_s:
                continue
            polled = 0.0
            guard.touch(self.guard)
            limit = self.seconds * (FIRST_STEP if seen == 0 else 1)
            if idle > limit or (self.party.shared and is_called(self.party.folder)):
                self._end()
                return

    def _sample(self, past: float) -> None:
        """Count the seconds since the last look as the rank's own work, or as waiting for other ranks."""
        if self.progress.beats == 0:
            return  # the first step loads and compiles
        nearest = _first(sys._current_frames().get(self.watched), 4)
        if any(file.endswith(DISTRIBUTED) or name == "wait" for file, name in nearest):
            self.waiting_s += past
        else:
            self.busy_s += past

    def _end(self) -> None:
        """Report, let one rank sum up for all, and end this process."""
        faulthandler.dump_traceback_later(6 * ANSWER_S, exit=True)  # should even this hang
        with suppress(OSError):  # a full disk must not keep the run from ending
            if self.party.shared:
                call_all(self.party.folder)
            self._report()
        waits = self._answers()
        if not self.party.shared or self.rank == min(waits, default=self.rank):
            lines = summary(waits, self.party.hosts, seconds=self.seconds, folder=self.party.folder)
            for line in lines:
                log.error(line)
            with suppress(OSError):
                (self.party.folder / SUMMARY).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._until(lambda: (self.party.folder / SUMMARY).exists())  # a launcher ends all ranks at the first exit that it sees
        sys.stdout.flush()
        sys.stderr.flush()
        self.end(REQUEUE)

    def _report(self) -> None:
        self.party.folder.mkdir(parents=True, exist_ok=True)
        with (self.party.folder / f"rank-{self.rank:05}.txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\nCollectives of this rank that have not ended, oldest first:\n")
            file.writelines(f"{entry}\n" for entry in open_collectives())
        write_report(self.party.folder, self._wait())

    def _answers(self) -> dict[int, Wait]:
        """The reports of all ranks, or of those that have answered in time."""
        if not self.party.shared:
            return {self.rank: self._wait()}
        self._until(lambda: len(read_reports(self.party.folder)) == len(self.party.hosts))
        return read_reports(self.party.folder)

    def _until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.answer_s
        while time.monotonic() < deadline and not done():
            guard.touch(self.guard)
            time.sleep(0.05)

    def _wait(self) -> Wait:
        frame = sys._current_frames().get(self.watched)
        return wait_of(
            frame, open_collectives(), rank=self.rank, host=self.party.hosts[self.rank], step=self.progress.step, layout=self.layout
        )


def wait_of(frame: FrameType | None, collectives: Sequence[dict[str, Any]], *, rank: int, host: str, step: int, layout: Layout) -> Wait:
    """What a rank does, from the stack of its main thread and its collectives under way."""
    rooms = [_room(f) for f in _frames(frame)]  # innermost first
    in_distributed = any(file.endswith(DISTRIBUTED) for file, _ in _first(frame, 12))
    where, kind = next(((words, kind) for room, words, kind in map(_meaning, rooms) if room), ("", "code"))
    wait = partial(Wait, rank=rank, host=host, step=step)
    if kind == "data":
        return wait(kind=kind, where=where)
    if collectives and (in_distributed or kind == "code"):
        entry = collectives[0]
        operation = str(entry.get("profiling_name", "")).partition(":")[2].lower().replace("_", "-") or "a collective"
        number = int(entry.get("collective_seq_id", 0)) if not entry.get("is_p2p") else int(entry.get("p2p_seq_id", 0))
        return wait(kind="collective", where=where, group=_group(entry, rank=rank, layout=layout), operation=operation, number=number)
    if in_distributed:
        # gloo's sends and receives are not in the flight recorder
        names = [name for file, name in _first(frame, 12) if file.endswith("p2p_communication.py") and not name.startswith("_")]
        operation = (names[-1] if names else _first(frame, 1)[0][1]).replace("_", "-")
        return wait(kind="collective", where=where, group="pipeline" if names else "", operation=operation)
    if where:
        return wait(kind=kind, where=where)
    place = _first(frame, 1)
    return wait(kind="code", where=f"{Path(place[0][0]).name}, {place[0][1]}()" if place else "no Python code")


def open_collectives() -> list[dict[str, Any]]:
    """What torch's flight recorder holds of collectives that have been issued and not ended, oldest
    first; empty where it has none.
    """
    import torch._C._distributed_c10d as c10d

    names = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
    found: list[dict[str, Any]] = []
    for dump in (getattr(c10d, name) for name in names if hasattr(c10d, name)):
        with suppress(Exception):  # its form is torch's own affair, and the report is worth having without it
            found += [e for e in json.loads(dump(True, False)).get("entries", ()) if not e.get("retired") and e.get("state") != "completed"]
    unique = {e.get("record_id"): e for e in found}
    return sorted(unique.values(), key=lambda e: e.get("time_created_ns", 0))


def _group(entry: dict[str, Any], *, rank: int, layout: Layout) -> str:
    name, description = (*entry.get("process_group", ()), "", "")[:2]
    with suppress(Exception):
        for group, known in dist.distributed_c10d._world.pg_names.items():
            if known == name:
                return group_names(layout, rank).get(tuple(dist.get_process_group_ranks(group)), description)
    return str(description)


def _meaning(room: tuple[str, str]) -> tuple[bool, str, str]:
    """Whether a frame of ours tells what its rank is at; the words for it, and what kind it is."""
    file, name = room
    if file.startswith("data/") or (file == "train/feed.py" and name in ("fetch", "_next")):
        return True, "its data loader", "data"
    if file.startswith("checkpoint/"):
        return True, "its checkpoint", "checkpoint"
    if file == "train/hooks.py":
        return True, "a hook of the user's", "hook"
    if file == "train/loop.py" and name in ("evaluate", "_evaluate"):
        return True, "its evaluation", "code"
    return False, "", "code"


def _room(frame: FrameType) -> tuple[str, str]:
    """The file of a frame within the toolkit, and its function; empty for other code."""
    path = frame.f_code.co_filename
    _, room, within = path.rpartition(ROOM)
    return (within.replace(os.sep, "/"), frame.f_code.co_name) if room and "site-packages" not in within else ("", "")


def _frames(frame: FrameType | None) -> list[FrameType]:
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _first(frame: FrameType | None, most: int) -> list[tuple[str, str]]:
    return [(f.f_code.co_filename.replace(os.sep, "/"), f.f_code.co_name) for f in _frames(frame)[:most]]
