"""Keeps a run alive over hosts that die and come back: start the ranks, see what fails, plan again,
go on from the checkpoint.

The supervisor holds the locks of the run's folders, starts one agent a host over ssh (host.py) and
does nothing but listen. What it must know lies in the run folder, so it may be killed and started
again: the hosts then end their ranks, and a new supervisor goes on from the newest checkpoint.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from toolkit.checkpoint.claim import checkpoint_folder, claim
from toolkit.checkpoint.manifest import discover
from toolkit.cluster.environment import PLANNED, SUPERVISED, deepspeed_env_lines, users_variables
from toolkit.cluster.hosts import SSH_TIMEOUT_S, unreachable
from toolkit.cluster.jobs import MASTER_PORT
from toolkit.cluster.stalls import STALLED, SUMMARY
from toolkit.config.schema import RunConfig
from toolkit.errors import MachineError
from toolkit.runfolder.files import METRICS
from toolkit.runfolder.metrics import read_metrics
from toolkit.runfolder.recoveries import Recovery
from toolkit.supervise.host import facts
from toolkit.supervise.layouts import Layouts, Start
from toolkit.supervise.member import Event, Member, Prober
from toolkit.supervise.phases import Phases

log = logging.getLogger("toolkit.supervise")

PROBE_S = 5.0  # between two looks whether a lost host answers again
POLL_S = 0.1
LOOK_S = 0.5  # between two looks into the run folder
START_S = 300.0  # for a host to say that it is there
FRUITLESS = 3  # starts in a row that take no step
FINAL_CODES = (2, 3, 4)  # a rank's own refusal: another start would say the same


@dataclass
class Ended:
    """How a start ended. code: 0 when the run is done; final: another start would not help; lost:
    hosts that are gone.
    """

    code: int
    reason: str
    lost: list[str] = field(default_factory=list)
    joining: bool = False
    final: bool = False
    silent_s: float = 0.0


class Supervisor:
    """hosts: of the hostfile, in order; slots: ranks of each; config: resolved for the layout that
    all of them have.

    The first hosts take part, and the last `spares` wait. Raises MachineError when fewer than
    min_nodes are left.
    """

    def __init__(
        self,
        path: Path,
        overrides: Sequence[str],
        config: RunConfig,
        hosts: Mapping[str, int],
        *,
        min_nodes: int,
        spares: int,
        lost_after_s: float,
    ) -> None:
        self.path, self.overrides, self.config = path, list(overrides), config
        self.hosts, self.slots = list(hosts), next(iter(hosts.values()))
        self.min_nodes, self.wanted, self.lost_after_s = min_nodes, len(hosts) - spares, lost_after_s
        self.layouts = Layouts(path, overrides, slots=self.slots, hosts_of_config=self.wanted)
        self.run = config.run.dir
        self.events: queue.Queue[Event] = queue.Queue()
        self.down: set[str] = set()
        self.refused: set[str] = set()  # hosts of another version, for good
        self.starts = 0
        self.signals: list[int] = []
        self.port = MASTER_PORT
        self.recovery: Recovery | None = None
        self.prober = Prober(PROBE_S)
        self.nodes_now = 0
        self.resumed_step = 0

    def supervise(self) -> int:
        """Run to the end; the exit code of the run."""
        before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        folders = claim(self.config, will_save=True)
        try:
            if last := self._last_step():
                log.info("the supervisor was started again: going on from the newest checkpoint")
                self.recovery = Recovery(at=_now(), reason="the supervisor was started again", hosts=0, layout="", last_step=last)
            self._look()
            return self._loop()
        finally:
            self.prober.close()
            folders.release()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)

    def _loop(self) -> int:
        fruitless = 0
        while True:
            if self.signals:
                return 128 + self.signals[0]
            start, names = self._plan()
            step = self._last_step()
            ended = self._start(start, names)
            if ended.code == 0 or ended.final:
                return ended.code
            fruitless = 0 if self._last_step() > step or ended.joining or ended.lost else fruitless + 1
            if fruitless >= FRUITLESS:
                raise MachineError(
                    f"{FRUITLESS} starts in a row have taken no step: {ended.reason}",
                    fix="Look at what the ranks say above, and at toolkit doctor.",
                )
            log.warning("%s; going on from the newest checkpoint", ended.reason)

    # who takes part

    def _look(self) -> None:
        """Find out which hosts answer, before the first start."""
        failed = unreachable(self.hosts)
        for host, why in failed.items():
            log.warning("host %s is left out: ssh does not reach it (%s)", host, why)
            self.down.add(host)

    def _plan(self) -> tuple[Start, list[str]]:
        """The layout for the hosts that are there, and those that take part in it."""
        began = time.monotonic()
        if len(self._there()) < self.min_nodes and self.down:
            # before giving up: some may only have been cut off for a moment
            failed = unreachable(sorted(self.down))
            for host in self.down - failed.keys():
                self._restore(host)
        there = self._there()
        if len(there) < self.min_nodes:
            gone = [host for host in self.hosts if host not in there]
            raise MachineError(
                f"{len(there)} of {len(self.hosts)} hosts are left, and --min-nodes is {self.min_nodes}",
                why=f"{', '.join(gone)} {'are' if len(gone) > 1 else 'is'} lost",
                fix="Start the same command again once they are back; the run goes on from its newest checkpoint.",
            )
        start = self.layouts.on(min(len(there), self.wanted))
        if self.recovery is not None:
            self.recovery.seconds["plan"] = time.monotonic() - began
        return start, there[: start.nodes]

    def _there(self) -> list[str]:
        """Hosts that may take part, in the hostfile's order."""
        return [host for host in self.hosts if host not in self.down and host not in self.refused]

    # one start

    def _start(self, start: Start, names: list[str]) -> Ended:
        self.starts += 1
        self.events = queue.Queue()
        began = time.time()
        self.nodes_now, self.resumed_step = len(names), self._newest()
        python_path, timeout_s = os.environ.get("PYTHONPATH", ""), min(SSH_TIMEOUT_S, max(1, round(self.lost_after_s)))
        members = [Member(host, self.events, python_path=python_path, timeout_s=timeout_s) for host in names]
        spec = self._spec(start, names)
        for member in members:
            member.begin(spec)
        log.info("start %d: %d hosts (%s), %s", self.starts, len(names), ", ".join(names), start.described)
        if self.recovery is not None:
            self.recovery.hosts, self.recovery.layout = len(names), start.described
        phases = Phases(self.run, self.recovery, began=began, resumed_step=self.resumed_step)
        ended = Ended(1, "the supervisor failed")
        try:
            ended = self._watch(members, phases)
        finally:
            torn = time.time()
            for member in members:
                member.tell({"do": "stop"})
            for member in members:
                member.end(lost=member.host in ended.lost)
        self.recovery = None
        if ended.code and not ended.final:
            self._note_loss(ended, names, began=began, torn=torn)
        return ended

    def _note_loss(self, ended: Ended, names: Sequence[str], *, began: float, torn: float) -> None:
        for host in ended.lost:
            self.down.add(host)
        detect = 0.0 if ended.joining else ended.silent_s
        with suppress(OSError):
            stepped = (self.run / METRICS).stat().st_mtime
            if stepped > began and not ended.joining:
                detect = torn - stepped  # a fault strikes after the last step that all have taken
        self.recovery = Recovery(
            at=_now(),
            reason=ended.reason,
            hosts=0,
            layout="",
            lost=ended.lost,
            joined=[host for host in self.hosts if ended.joining and host not in names and host not in self.down],
            last_step=self._last_step(),
            seconds={"detect": detect, "tear down": time.time() - torn},
        )

    def _spec(self, start: Start, names: Sequence[str]) -> dict[str, Any]:
        environment = users_variables() or dict(line.split("=", 1) for line in deepspeed_env_lines())
        self.port = MASTER_PORT + (self.port - MASTER_PORT + 1) % 100  # the last start's may not be free again yet
        return {
            "id": secrets.token_hex(4),
            "nodes": len(names),
            "slots": self.slots,
            "master": names[0],
            "port": self.port,
            "words": [str(self.path), *self.overrides, *start.words],
            "environment": {**environment, PLANNED: "1", SUPERVISED: "1"},
            "lost_after_s": self.lost_after_s,
        }

    def _watch(self, members: Sequence[Member], phases: Phases) -> Ended:
        """Listen until the start has ended, in whatever way."""
        began, looked, asked, handled = time.monotonic(), 0.0, False, 0
        newest = self._newest()
        while True:
            with suppress(queue.Empty):
                member, message = self.events.get(timeout=POLL_S)
                if ended := self._heard(member, message, members, asked=asked):
                    return ended
            now = time.monotonic()
            if now - looked >= LOOK_S:
                looked = now
                phases.look()
                if not asked and self._returned(newest):
                    log.info("a host is back: the ranks end after this step, and start again with it")
                    asked = True
                    for member in members:
                        member.tell({"do": "end"})
            silent = [m for m in members if m.silent_s() > (self.lost_after_s if m.answering else START_S)]
            if silent:
                lost = [m.host for m in silent]
                return Ended(
                    1,
                    f"lost {_list(lost)}: no sign of life for {silent[0].silent_s():.1f} s",
                    lost,
                    silent_s=max(m.silent_s() for m in silent),
                )
            if now - began > START_S and not phases.opened and any(m.facts is None for m in members):
                lost = [m.host for m in members if m.facts is None]
                return Ended(1, f"{_list(lost)} did not start within {START_S:.0f} s", lost)
            if len(self.signals) > handled:
                handled = len(self.signals)
                if handled > 1:
                    return Ended(128 + self.signals[0], "a second signal", final=True)
                log.warning("%s: the ranks end after this step; a second signal kills them", signal.Signals(self.signals[0]).name)
                for member in members:
                    member.tell({"do": "end"})

    def _heard(self, member: Member, message: dict[str, Any], members: Sequence[Member], *, asked: bool) -> Ended | None:
        if "facts" in message:
            return self._other_version(member)
        if "gone" in message and member.result is None:
            if self.signals:
                return Ended(128 + self.signals[0], "stopped by a signal", final=True)
            # one that has never answered has just been asked
            lost = self._unreachable([member.host]) if member.answering else [member.host]
            return Ended(1, f"lost {member.host}: its agent is gone", lost, silent_s=member.silent_s())
        if "ended" not in message:
            return None
        code = int(message["ended"])
        if code == 0:
            return Ended(0, "done") if all(m.result is not None and m.result["ended"] == 0 for m in members) else None
        return self._failed(member, code, message, members, asked=asked)

    def _failed(self, member: Member, code: int, message: dict[str, Any], members: Sequence[Member], *, asked: bool) -> Ended:
        """A host's ranks have ended early: what that means for the run."""
        began = time.monotonic()
        if self.signals:
            self._settle(members)
            return Ended(128 + self.signals[0], "stopped by a signal", final=True)
        if asked:
            self._settle(members)
            return Ended(code, "a host is back", joining=True)
        if code in FINAL_CODES:
            self._settle(members)
            return Ended(code, f"the ranks of {member.host} refuse to go on", final=True)
        ranks = ", ".join(f"rank {rank} ended with {_code(int(c))}" for rank, c in message.get("failures", {}).items())
        suspects = self._silent(members)  # the first host to report may only have noticed that another one is gone
        stalled = self._stalled_hosts()
        reason = f"lost {_list(suspects)}" if suspects else f"on {member.host} {ranks or message.get('why') or 'the agent failed'}"
        return Ended(code, reason + (f" ({stalled})" if stalled else ""), suspects, silent_s=time.monotonic() - began)

    def _settle(self, members: Sequence[Member], seconds: float = 60.0) -> None:
        """Give ranks that end by themselves the time to do so: a save may be under way."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(m.result is None and not m.gone for m in members):
            time.sleep(POLL_S)

    def _silent(self, members: Sequence[Member]) -> list[str]:
        """Hosts that have nothing more to say, once every other one has said something again."""
        asked = time.monotonic()

        def silent() -> list[Member]:
            return [m for m in members if m.answering and m.heard < asked and m.result is None and not m.gone]

        while any(m.silent_s() <= self.lost_after_s for m in silent()):
            time.sleep(POLL_S)
        others = [m.host for m in members if m.result is None and (m.gone or not m.answering)]
        return [m.host for m in silent()] + self._unreachable(others)

    def _unreachable(self, hosts: Sequence[str]) -> list[str]:
        failed = unreachable(hosts)
        return [host for host in hosts if host in failed]

    def _other_version(self, member: Member) -> Ended | None:
        """A host with other packages is left out for good: its ranks would compute something else,
        or not meet the others.
        """
        mine = facts()
        other = {name: (theirs, mine[name]) for name, theirs in (member.facts or {}).items() if mine.get(name) != theirs}
        if not other:
            return None
        words = ", ".join(f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in other.items())
        self.refused.add(member.host)
        log.warning("host %s is left out: it has %s. Install the same there and start again", member.host, words)
        return Ended(1, f"{member.host} has {words}", [member.host])

    # what lies in the run folder

    def _last_step(self) -> int:
        records = read_metrics(self.run)
        return int(records[-1]["step"]) if records else 0

    def _newest(self) -> int:
        """The step of the newest complete checkpoint."""
        with suppress(OSError):
            return max((f.step for f in discover(checkpoint_folder(self.config)) if f.manifest), default=0)
        return 0

    def _restore(self, host: str) -> None:
        self.down.discard(host)
        self.prober.asked.discard(host)
        self.prober.back.discard(host)

    def _stalled_hosts(self) -> str:
        found = sorted((self.run / STALLED).glob(f"*/{SUMMARY}"))
        if not found or time.time() - found[-1].stat().st_mtime > 60:
            return ""
        return found[-1].read_text(encoding="utf-8").splitlines()[0]

    def _returned(self, newest: int) -> bool:
        """Whether the run should start again with hosts that are back: at the first checkpoint
        after they have answered.
        """
        self.prober.asked = self.down - self.refused
        for host in self.prober.back & self.down:
            log.info("host %s answers again", host)
            self._restore(host)
        there = self._there()
        running = self.layouts.on(min(len(there), self.wanted)).nodes
        return running > self.nodes_now and self._newest() > newest


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _list(hosts: Sequence[str]) -> str:
    return ", ".join(hosts)


def _code(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
