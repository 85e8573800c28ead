"""`python -m toolkit.supervise.host`: what the supervisor starts on each host, once for every start
of the run's ranks.

It runs torch's elastic agent, which meets those of the other hosts, starts this host's ranks and ends
them at the first failure. The supervisor writes lines of JSON to its standard input and reads others
from its standard output: a sign of life every second both ways. A host that no longer hears its
supervisor ends its ranks: the run may already go on elsewhere.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from importlib.metadata import version
from typing import IO, Any

import psutil

BEAT_S = 1.0


class Host:
    """This host's side of a start."""

    def __init__(self, answers: IO[str], *, lost_after_s: float) -> None:
        self.answers, self.lost_after_s = answers, lost_after_s
        self.heard = time.monotonic()
        self.writing = threading.Lock()

    def tell(self, **message: Any) -> None:
        """Say something to the supervisor; where it cannot be reached this host ends its part."""
        with self.writing:
            try:
                self.answers.write(json.dumps(message) + "\n")
                self.answers.flush()
            except OSError:
                self.give_up()

    def listen(self) -> None:
        """Do what the supervisor says, until it is gone."""
        for line in sys.stdin:
            self.heard = time.monotonic()
            said = json.loads(line)
            if said.get("do") == "stop":
                self.give_up()
            elif said.get("do") == "end":  # at the next step, with a checkpoint
                found = ranks()
                for rank in found:
                    with suppress(psutil.NoSuchProcess):
                        rank.send_signal(signal.SIGTERM)
                if not found:  # they are still to be started
                    self.give_up()
        self.give_up()

    def beat(self) -> None:
        """Give a sign of life every second, and end this host's ranks when none comes back."""
        while True:
            time.sleep(BEAT_S)
            if time.monotonic() - self.heard > self.lost_after_s:
                self.give_up()
            self.tell(beat=True)

    def give_up(self) -> None:
        """Kill the ranks and end at once."""
        for rank in ranks():
            with suppress(psutil.NoSuchProcess):
                for process in (*rank.children(recursive=True), rank):
                    process.kill()
        os._exit(1)


def ranks() -> list[psutil.Process]:
    """This host's ranks: what the agent has started."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "toolkit.supervise.rank" in child.cmdline():
                found.append(child)
    return found


def facts() -> dict[str, Any]:
    """What all hosts must have alike."""
    from toolkit import __version__

    names = ("torch", "deepspeed", "megatron-core")
    return {"toolkit": __version__, "python": sys.version.split()[0], **{name: version(name) for name in names}}


def main() -> int:
    """Run the ranks of one start; returns 0 when they have all ended well."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ranks print must not come between the messages
    spec = json.loads(sys.stdin.readline())
    os.environ.update(spec["environment"])
    host = Host(answers, lost_after_s=spec["lost_after_s"])
    for work in (host.listen, host.beat):
        threading.Thread(target=work, daemon=True).start()
    host.tell(hello=socket.gethostname(), facts=facts())
    code, failures, why = run_ranks(spec)
    host.tell(ended=code, failures=failures, why=why)
    return code


def run_ranks(spec: dict[str, Any]) -> tuple[int, dict[str, int], str]:
    """Start this host's ranks through torch's elastic agent; the exit code, those of ranks that
    failed, and what else went wrong.

    That is for the supervisor to say: agents of other hosts fail as well when the one is gone where
    they meet.
    """
    quiet = "TORCH_CPP_LOG_LEVEL" not in os.environ
    if quiet:  # the agent's own connections, whose warnings no user can act on; the ranks keep theirs
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from toolkit.cluster.jobs import address_towards

    if quiet:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    address, is_host = address_towards(spec["master"], spec["port"])
    config = LaunchConfig(
        min_nodes=spec["nodes"],
        max_nodes=spec["nodes"],
        nproc_per_node=spec["slots"],
        run_id=spec["id"],
        rdzv_backend="c10d",
        rdzv_endpoint=f"{spec['master']}:{spec['port']}",
        rdzv_configs={"is_host": str(is_host).lower(), "timeout": 300},
        max_restarts=0,  # the layout may have to change, which is the supervisor's affair
        monitor_interval=0.1,
        local_addr=address,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "toolkit.supervise.rank", *spec["words"])
    except ChildFailedError as error:
        failures = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
        own = [code for code in failures.values() if code > 0]
        return (min(own) if own else 128 - min(failures.values(), default=-1)), failures, ""
    except Exception as error:
        return 1, {}, f"the agent failed: {type(error).__name__}: {error}"
    return 0, {}, ""


if __name__ == "__main__":
    result = main()
    sys.stderr.flush()
    os._exit(result)  # the listening thread waits for a line that need not come
