"""`toolkit generate --interactive`: a conversation that outlives the ranks that hold the model.

This process holds the conversation, and no torch. The ranks hold the model. When there are other
devices than before, or a rank has died, it ends them, has the model cut anew from its files over
the devices that there are, and goes on where the conversation was.
"""

from __future__ import annotations

import json
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from toolkit.cluster.environment import gpu_count, rank_environment
from toolkit.errors import ConfigError, MachineError, ToolkitError
from toolkit.inference.auto import choice_for, devices_here, with_choice
from toolkit.inference.ranks import RankDied, start_rank
from toolkit.inference.request import Request
from toolkit.inference.source import Model, open_model

START_S = 1800.0  # a large model comes from a slow disk
END_S = 10.0
HELP = "/devices N: go on with so many; /new: begin again; /quit or end of input: leave"


class Ranks:
    """The processes that hold a model, and a connection to each."""

    def __init__(self, request: Request, processes: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="toolkit-generate-"))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[socket.socket] = []
        self.buffers: dict[socket.socket, bytes] = {}
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                path = self.folder / "s"
                listener.bind(str(path))
                listener.listen(processes)
                listener.settimeout(0.2)
                request = replace(request, socket=str(path))
                request.save(self.folder / "request.json")
                env = rank_environment(processes)
                for rank in range(processes):
                    self.processes.append(start_rank(self.folder / "request.json", rank=rank, size=processes, env=env))
                self._accept(listener)
            first = [(self._message(c, deadline=time.monotonic() + START_S), c) for c in self.connections]
            ready = {message["ready"]: c for message, c in first}
            self.connections = [ready[rank] for rank in range(processes)]
            self.layers_per_stage: list[int] = first[0][0]["layers_per_stage"]
        except BaseException:
            self.close()
            raise

    def _accept(self, listener: socket.socket) -> None:
        deadline = time.monotonic() + START_S
        while len(self.connections) < len(self.processes):
            self.check()
            with suppress(TimeoutError):
                self.connections.append(listener.accept()[0])
            if time.monotonic() > deadline:
                raise MachineError(f"a rank did not start within {START_S:.0f} s", fix="Look at what it says above.")

    def check(self) -> None:
        """Raise RankDied where a rank has ended."""
        for rank, process in enumerate(self.processes):
            if (code := process.poll()) is not None:
                raise RankDied(rank, code)

    def ask(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Send a prompt to all ranks; the pieces of the answer as they come, and the answer at the
        end. Raises RankDied.
        """
        line = (json.dumps(asked) + "\n").encode()
        for connection in self.connections:
            try:
                connection.sendall(line)
            except OSError:
                self._end_of(connection)
        while True:
            message = self._message(self.connections[0])
            yield message
            if "piece" not in message:
                return

    def _message(self, connection: socket.socket, *, deadline: float = float("inf")) -> dict[str, Any]:
        """A rank's next line; RankDied where any rank hangs up before it."""
        with selectors.DefaultSelector() as selector:
            for one in self.connections:
                selector.register(one, selectors.EVENT_READ)
            while b"\n" not in self.buffers.get(connection, b""):
                ready = selector.select(1.0)
                if not ready:
                    self.check()
                for key, _ in ready:
                    each: socket.socket = key.fileobj  # type: ignore[assignment]
                    data = each.recv(65536)
                    if not data:
                        self._end_of(each)
                    self.buffers[each] = self.buffers.get(each, b"") + data
                if time.monotonic() > deadline:
                    raise MachineError(f"a rank has not loaded its part within {START_S:.0f} s", fix="Look at what it says above.")
        line, _, rest = self.buffers[connection].partition(b"\n")
        self.buffers[connection] = rest
        found: dict[str, Any] = json.loads(line)
        return found

    def _end_of(self, connection: socket.socket) -> None:
        """A connection that was closed: wait for the process that ends, and say which it was."""
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline:
            self.check()
            time.sleep(0.05)
        raise RankDied(self.connections.index(connection), 1)

    def close(self) -> None:
        """End the ranks: they leave when their conversation hangs up, and are killed where they do not."""
        for connection in self.connections:
            connection.close()
        dead = any(p.poll() is not None for p in self.processes)
        for process in self.processes:
            if dead or len(self.connections) < len(self.processes):
                process.kill()  # it may wait for one that is gone
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            if process.poll() is None:
                process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class Conversation:
    """What has been said, and the ranks that answer. request: without prompts; devices: to use,
    None for those that are there.
    """

    request: Request
    devices: int | None = None
    fixed: Sequence[str] = ()
    note: Callable[[str], Any] = lambda _text: None
    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""
    ranks: Ranks | None = None
    cut: str = ""
    lost: int = 0
    _rebalances: bool = False
    _of: int = 0
    _model: Model | None = None

    def say(self, words: str, *, show: Callable[[str], Any] = lambda _piece: None) -> dict[str, Any]:
        """The answer to a line. Where a rank dies, the model is cut over the devices that are left,
        and the line asked again.
        """
        asked = {"messages": [*self.messages, {"role": "user", "content": words}]} if self.request.chat else {"text": self.text + words}
        shown = ""
        while True:
            self._recut()
            assert self.ranks is not None
            answer: dict[str, Any] = {}
            so_far = ""
            try:
                for answer in self.ranks.ask(asked):
                    so_far += answer.get("piece", "")
                    if len(so_far) > len(shown):  # what was on the screen before a rank died is not shown again
                        show(so_far[len(shown) :])
                        shown = so_far
                break
            except RankDied as death:
                self._mourn(death)
        if "error" in answer:
            raise ConfigError(answer["error"].rstrip("."), fix="/new begins the conversation again.")
        if self._rebalances:
            self._rebalance()
        self.messages += [{"role": "user", "content": words}, {"role": "assistant", "content": answer["text"]}]
        self.text += words + answer["text"]
        return answer

    def _rebalance(self) -> None:
        """Have the ranks move the cut where the answer has shown that another one is faster, or
        that this one no longer fits.
        """
        assert self.ranks is not None
        try:
            (message,) = self.ranks.ask({"rebalance": True})
        except RankDied as death:  # the answer is whole; the next line has the model cut anew
            self._mourn(death)
            return
        self.ranks.layers_per_stage = message["layers_per_stage"]
        if message["recut"]:
            self.note(message["recut"])

    def again(self) -> None:
        """Forget what has been said."""
        self.messages, self.text = [], ""

    def close(self) -> None:
        """End the ranks."""
        if self.ranks is not None:
            self.ranks.close()
            self.ranks = None

    def _there(self) -> int:
        there = devices_here(self.devices)
        if self.devices is not None and 0 < gpu_count() < there:
            there = gpu_count()  # fewer GPUs than were asked for
        return max(1, there - self.lost)

    def _recut(self) -> None:
        """Have the model in the memory of the devices that are there."""
        there = self._there()
        if self.ranks is not None and there == self._of:
            return
        self.close()
        self._model = self._model or open_model(Path(self.request.model))
        choice = choice_for(
            self.request,
            devices=there,
            fixed=self.fixed,
            spread=True,
            tokens=self._model.section.max_position_embeddings,
            model=self._model,
        )
        way = choice.way
        self.cut = f"tp {way.tp} x pp {way.pp}"
        self.note(f"{there} device{'s' * (there > 1)}: {'; '.join(choice.reasons)}")
        # a conversation has one prompt in flight, which the fastest device alone would answer
        # soonest: measured only where it is asked for
        measured = self.request.layers_per_stage == "measured" and way.pp > 1 and way.offload == "none"
        request = replace(with_choice(self.request, choice), batch=1, layers_per_stage="measured" if measured else "even")
        self._rebalances = request.rebalance
        try:
            self.ranks = Ranks(request, way.tp * way.pp)
        except RankDied as death:
            raise MachineError(str(death), why="it could not load its part of the model", fix="Look at what it says above.") from None
        self._of = there

    def _mourn(self, death: RankDied) -> None:
        """A rank's device is taken for lost."""
        there = self._of
        self.close()
        if there == 1:
            raise MachineError(str(death), why="there is no other device", fix="Start again; less memory is needed with --weights int8.")
        self.lost += 1
        self.note(f"{death}; going on with {there - 1} of {there} devices")


def converse(request: Request, *, devices: int | None, fixed: Sequence[str], lines: TextIO, out: TextIO) -> None:
    """Answer each line until the input ends. JSON: one object a line."""
    note: Callable[[str], Any] = lambda text: sys.stderr.write(f"{text}\n")
    terminal = lines.isatty() and not request.as_json
    talk = Conversation(request, devices=devices, fixed=fixed, note=note)
    if terminal:
        note(HELP)

    def show(piece: str) -> None:
        if not request.as_json:
            out.write(piece)
            out.flush()

    try:
        while True:
            if terminal:
                out.write("> ")
                out.flush()
            line = lines.readline()
            words = line.removesuffix("\n")
            if not line or words.strip() == "/quit":
                return
            try:
                if words.startswith("/"):
                    _command(talk, words)
                    continue
                if not words:
                    continue
                answer = talk.say(words, show=show)
            except ConfigError as error:  # the next line may be a better one
                note(f"error: {error}")
                continue
            if request.as_json:
                found = {"prompt": words, **{k: answer[k] for k in ("text", "tokens", "finish")}, "cut": talk.cut}
                if talk.ranks is not None:
                    found["layers_per_stage"] = talk.ranks.layers_per_stage
                out.write(json.dumps(found, ensure_ascii=False) + "\n")
            else:
                out.write("\n")
            out.flush()
    except KeyboardInterrupt:
        raise ToolkitError("interrupted", fix="The conversation is not kept.") from None
    finally:
        talk.close()


def _command(talk: Conversation, words: str) -> None:
    name, _, value = words.partition(" ")
    if name == "/new":
        talk.again()
    elif name == "/devices" and value.strip().isdigit() and int(value) > 0:
        talk.devices, talk.lost = int(value), 0
    else:
        raise ConfigError(f"{words} is no command", fix=HELP[0].upper() + HELP[1:] + ".")
