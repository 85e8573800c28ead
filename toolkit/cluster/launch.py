"""Start ranks through DeepSpeed's launcher and end them properly: signals reach the ranks, and
their exit code comes back.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import importlib.util
import json
import logging
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from toolkit.cluster.environment import deepspeed_env_lines, device_ids, export_environment, rank_environment, users_variables
from toolkit.cluster.hosts import check_reachable, read_hostfile
from toolkit.cluster.stalls import REQUEUE, SUMMARY
from toolkit.cluster.words import check_exports, check_host, check_place, exported_by_deepspeed, packed
from toolkit.errors import ConfigError, MachineError, ToolkitError
from toolkit.redact import is_secret

__all__ = [
    "cluster_command",
    "deepspeed_env_lines",
    "end_with_parent",
    "export_environment",
    "free_port",
    "local_command",
    "run_local",
]

logger = logging.getLogger(__name__)

TRAIN_MODULE = "toolkit.train"
POLL_S = 0.2
PORTS = range(21000, 29000)  # Linux gives those from 32768 on, and a run of a cluster has 29500
SECOND_SIGNAL_S = 1.0
STALL_GRACE_S = 15.0  # for a run that has reported that it makes no progress to end by itself
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def free_port() -> int:
    """A TCP port nobody listens on at this moment, for the ranks' first meeting.

    It is none of those that the kernel gives to whoever asks for any. Seconds pass until rank 0
    listens, and one of those could be given away in the meantime.
    """
    chance = random.SystemRandom()  # a seed that is set elsewhere must not give two runs the same port
    for port in chance.sample(PORTS, min(len(PORTS), 100)):
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return port
    raise MachineError("no free port was found", why=f"those tried, from {PORTS[0]} to {PORTS[-1]}, are taken", fix="End what has them.")


def local_command(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    num_procs: int,
    python: str = sys.executable,
    module: str = TRAIN_MODULE,
    master_port: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> list[str]:
    """The command that starts num_procs ranks on this machine with DeepSpeed's launcher.

    It is what `deepspeed --num_gpus N --no_local_rank --module …` itself runs for one host; without
    the `deepspeed` script in front the first rank starts 1.3 s earlier (DeepSpeed is imported once
    less). The launcher's own log is off: what the ranks say is what the user sees. Raises
    ConfigError for num_procs < 1, MachineError for more ranks than GPUs.
    """
    if num_procs < 1:
        raise ConfigError(
            f"num_procs={num_procs} is less than 1", why="a run needs at least one process", fix="Set --num-procs to 1 or more."
        )
    world = base64.urlsafe_b64encode(json.dumps({"localhost": device_ids(num_procs, environ=environ)}).encode()).decode()
    launcher = [python, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1"]
    launcher += [f"--master_port={master_port or free_port()}", "--log_level=critical", "--no_local_rank", "--module"]
    return [*launcher, module, str(config_path), *overrides]


def run_local(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    num_procs: int,
    python: str = sys.executable,
    module: str = TRAIN_MODULE,
    environ: Mapping[str, str] | None = None,
) -> int:
    """Train on this machine and return the ranks' exit code: 0, a ToolkitError's code, or 128 + n
    where signal n ended it early.

    The first SIGINT or SIGTERM is passed to every rank, which ends at its next step boundary,
    however long the step; a second one, more than a second later, kills them. (DeepSpeed's launcher
    alone would tell one rank after the other and kill each after 30 s.) Where this process is
    itself killed, the launcher ends the ranks. Raises MachineError without DeepSpeed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise MachineError(
            "the package deepspeed is not installed", why="its launcher starts the ranks", fix="Install deepspeed>=0.19.5,<0.20."
        )
    env = rank_environment(num_procs, environ=environ, python=python)
    command = local_command(config_path, overrides, num_procs=num_procs, python=python, module=module, environ=env)
    logger.debug("starting %s", " ".join(command))
    received: list[int] = []
    times: list[float] = []

    def note(signum: int, frame: FrameType | None) -> None:
        # schedulers and `timeout` may signal this process and then its group: count that as one request
        if not times or time.monotonic() - times[-1] > SECOND_SIGNAL_S:
            received.append(signum)
            times.append(time.monotonic())

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)} if _in_main_thread() else {}
    try:
        # start a new session: otherwise Ctrl-C in a terminal also reaches the launcher, which kills its ranks
        process = subprocess.Popen(
            command, env=env, start_new_session=True, preexec_fn=end_with_parent if sys.platform == "linux" else None
        )
        return _exit_code(_supervise(process, received, module=module), asked=received[0] if received else None)
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def cluster_command(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    hostfile: Path,
    master_addr: str | None = None,
    master_port: int = 29500,
    runner: str = "pdsh",
    module: str = TRAIN_MODULE,
) -> list[str]:
    """The `deepspeed` command that starts the same run on every host of a hostfile, over pdsh and
    ssh or by OpenMPI's mpirun.

    The ranks' arguments are packed where a shell on the way would read something into them. Raises
    ConfigError for a hostfile that is missing or wrong (DeepSpeed would train on one machine, or
    show a traceback), and for a working folder or an address that cannot be packed.
    """
    hosts = read_hostfile(hostfile)
    check_place()
    if master_addr:
        check_host(master_addr, where="--master-addr")
    command = ["deepspeed", "--hostfile", str(hostfile)]
    if runner == "openmpi":
        command += [
            "--launcher",
            "openmpi",
            "--launcher_args",
            shlex.join(_mpirun_arguments(master_addr or next(iter(hosts)), master_port)),
        ]
    if master_addr:
        command += ["--master_addr", master_addr]
    words = [packed(str(word)) for word in (config_path, *overrides)]
    return [*command, "--master_port", str(master_port), "--no_local_rank", "--module", module, *words]


def _mpirun_arguments(master_addr: str, master_port: int, *, environ: Mapping[str, str] | None = None) -> list[str]:
    """What mpirun is told beside the hosts: where the ranks meet, since MPI itself only starts
    them, and the interface to use.
    """
    environ = os.environ if environ is None else environ
    arguments = ["-x", f"MASTER_ADDR={master_addr}", "-x", f"MASTER_PORT={master_port}", "--bind-to", "none"]
    interface = environ.get("NCCL_SOCKET_IFNAME") or environ.get("GLOO_SOCKET_IFNAME")
    if interface:
        arguments += ["--mca", "btl_tcp_if_include", interface, "--mca", "oob_tcp_if_include", interface]
    return [*arguments, "--allow-run-as-root"] if os.geteuid() == 0 else arguments


def run_on_hosts(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    hostfile: Path,
    master_addr: str | None = None,
    master_port: int = 29500,
    runner: str = "pdsh",
    stalled: Path | None = None,
) -> int:
    """Start a run on every host of a hostfile and return the launcher's exit code.

    What the ranks of other hosts need of this environment is exported, unless there is a
    .deepspeed_env of the user's own.
    stalled: where its watchdog reports; once it has, what is left of the run is ended, and the code
    is REQUEUE. Signals of a terminal reach the launcher, which passes them to the ranks; one sent
    to this process alone is passed on to it. Raises ConfigError for a wrong hostfile, MachineError
    for a host that ssh does not reach, or without the launcher.
    """
    check_reachable(read_hostfile(hostfile))
    command = cluster_command(config_path, overrides, hostfile=hostfile, master_addr=master_addr, master_port=master_port, runner=runner)
    command.insert(1, "--no_ssh_check")
    env = launcher_environment()
    if "DS_ENV_FILE" not in env and not users_variables(env):
        variables = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toolkit" / "deepspeed_env"
        export_environment(variables)
        env["DS_ENV_FILE"] = str(variables)
    if (launcher := shutil.which(command[0], path=env["PATH"])) is None:
        raise MachineError("the command deepspeed is not on the PATH", why="it starts the ranks of all hosts", fix="Install deepspeed.")
    process = subprocess.Popen([launcher, *command[1:]], env=env)
    previous = {s: signal.signal(s, lambda number, _: process.send_signal(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _watched(process, stalled=stalled)
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def _watched(process: subprocess.Popen[bytes], *, stalled: Path | None) -> int:
    """The exit code of a launcher. One that waits for a host that has stopped is ended once the
    other ranks have reported it.
    """
    before = _verdicts(stalled)
    reported: float | None = None
    while True:
        try:
            code = process.wait(POLL_S * 5)
            return REQUEUE if code and _verdicts(stalled) - before else _exit_code(code, asked=None)
        except subprocess.TimeoutExpired:
            pass
        if reported is None and _verdicts(stalled) - before:
            reported = time.monotonic()
        if reported is not None and time.monotonic() - reported > STALL_GRACE_S:
            children = psutil.Process(process.pid).children(recursive=True)  # pdsh and its ssh: the launcher alone would leave them
            process.kill()
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait()
            return REQUEUE


def _verdicts(stalled: Path | None) -> set[Path]:
    return set(stalled.glob(f"*/{SUMMARY}")) if stalled is not None else set()


def launcher_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for DeepSpeed's launcher of many hosts: without the secrets that it would put
    on command lines and into its log.

    Raises ConfigError for a variable that it exports, and that would not arrive as it is.
    """
    environ = os.environ if environ is None else environ
    exported = exported_by_deepspeed(environ)
    env = {name: value for name, value in environ.items() if name not in exported or not is_secret(name)}
    check_exports(env, exported_by_deepspeed(env))
    return {**env, "PATH": rank_environment(1, environ=environ)["PATH"]}


def _supervise(process: subprocess.Popen[bytes], received: list[int], *, module: str) -> int:
    """Wait for the launcher, passing on what arrives in `received`; returns its return code as
    Popen gives it.
    """
    handled = 0
    ranks: list[psutil.Process] = []
    while True:
        try:
            return process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            pass
        if ranks and len(received) == handled:
            continue
        now = _ranks(process.pid, module=module)
        ranks = ranks or now
        if len(received) == handled:
            continue
        handled = len(received)
        clear_line()
        if handled > 1:
            logger.warning("second signal: killing the ranks")
            os.killpg(process.pid, signal.SIGKILL)
        elif now:
            logger.warning("%s: the ranks end after this step; a second signal kills them", signal.Signals(received[0]).name)
            _terminate(now)
        elif not ranks:
            process.terminate()  # the launcher is still importing: there is no rank to end properly


def clear_line() -> None:
    """Make room on a terminal for a line of this process, where rank 0's progress bar may stand."""
    if sys.stdout.isatty():
        sys.stdout.write("\r\x1b[2K")


def _ranks(launcher: int, *, module: str) -> list[psutil.Process]:
    processes = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher).children():
            with suppress(psutil.NoSuchProcess):  # a rank has just ended
                if module in child.cmdline():  # the launcher also runs small tools while it starts
                    processes.append(child)
    return processes


def _terminate(ranks: Sequence[psutil.Process]) -> None:
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.terminate()


def _exit_code(returncode: int, *, asked: int | None) -> int:
    """Unfold the launcher's return code: it ends with sys.exit(-n), seen as 256 - n, when a rank
    was ended by signal n.

    asked: the signal that this process was sent, if any. The ranks are ended by SIGTERM whatever it was.
    """
    by_signal = -returncode if returncode < 0 else 256 - returncode if returncode > 256 - signal.NSIG else 0
    if asked and signal.SIGTERM in (by_signal, returncode - 128):
        return 128 + asked
    if not by_signal:
        return returncode
    name = signal.Signals(by_signal).name if by_signal in set(signal.Signals) else f"signal {by_signal}"
    hint = ": the machine may have run out of memory" if by_signal == signal.SIGKILL and asked is None else ""
    logger.error("the run was ended by %s%s", name, hint)
    return 128 + by_signal


def end_with_parent() -> None:
    """Ask the kernel to send this process SIGTERM when the one that started it dies; Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def main(argv: Sequence[str] | None = None) -> int:
    """Check a hostfile, write the file of exported variables and print the ranks' arguments packed,
    for launch/multi-node.sh.
    """
    parser = argparse.ArgumentParser(prog="python -m toolkit.cluster.launch", description=main.__doc__)
    parser.add_argument("--hostfile", type=Path, required=True)
    parser.add_argument("--env-file", type=Path, required=True)
    parser.add_argument("--master-addr", default="")
    parser.add_argument("words", nargs="*", help="arguments of the ranks, printed one a line")
    args = parser.parse_args(argv)
    try:
        read_hostfile(args.hostfile)
        check_place()
        launcher_environment()
        if args.master_addr:
            check_host(args.master_addr, where="MASTER_ADDR")
        export_environment(args.env_file)
        sys.stdout.write("".join(f"{packed(word)}\n" for word in args.words))
    except ToolkitError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
