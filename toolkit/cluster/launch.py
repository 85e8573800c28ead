"""Start ranks through DeepSpeed's launcher and end them properly: signals reach the ranks, and their exit code comes back."""

from __future__ import annotations

import argparse
import base64
import ctypes
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from toolkit.cluster.environment import deepspeed_env_lines, device_ids, export_environment, rank_environment
from toolkit.errors import ConfigError, MachineError, ToolkitError

__all__ = [
    "cluster_command",
    "deepspeed_env_lines",
    "end_with_parent",
    "export_environment",
    "free_port",
    "local_command",
    "read_hostfile",
    "run_local",
]

logger = logging.getLogger(__name__)

TRAIN_MODULE = "toolkit.train"
POLL_S = 0.2
SSH_TIMEOUT_S = 10
SECOND_SIGNAL_S = 1.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def free_port() -> int:
    """A TCP port nobody listens on at this moment, for the ranks' first meeting."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


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

    It is what `deepspeed --num_gpus N --no_local_rank --module …` itself runs for one host; without the `deepspeed` script in
    front the first rank starts 1.3 s earlier (DeepSpeed is imported once less). The launcher's own log is off: what the ranks say
    is what the user sees. Raises ConfigError for num_procs < 1, MachineError for more ranks than GPUs.
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
    """Train on this machine and return the ranks' exit code: 0, a ToolkitError's code, or 128 + n where signal n ended it early.

    The first SIGINT or SIGTERM is passed to every rank, which ends at its next step boundary, however long the step; a second
    one, more than a second later, kills them. (DeepSpeed's launcher alone would tell one rank after the other and kill each
    after 30 s.) Where this process is itself killed, the launcher ends the ranks. Raises MachineError without DeepSpeed.
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
    """The `deepspeed` command that starts the same run on every host of a hostfile, over pdsh and ssh or by OpenMPI's mpirun.

    Raises ConfigError for a hostfile that is missing or wrong (DeepSpeed would train on one machine, or show a traceback).
    """
    hosts = read_hostfile(hostfile)
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
    return [*command, "--master_port", str(master_port), "--no_local_rank", "--module", module, str(config_path), *overrides]


def _mpirun_arguments(master_addr: str, master_port: int, *, environ: Mapping[str, str] | None = None) -> list[str]:
    """What mpirun is told beside the hosts: where the ranks meet, since MPI itself only starts them, and the interface to use."""
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
) -> int:
    """Start a run on every host of a hostfile and return the launcher's exit code.

    What the ranks of other hosts need of this environment is exported, unless there is a .deepspeed_env of the user's own.
    Signals of a terminal reach the launcher, which passes them to the ranks; one sent to this process alone is passed on to it.
    Raises ConfigError for a wrong hostfile, MachineError for a host that ssh does not reach, or without the launcher.
    """
    check_reachable(read_hostfile(hostfile))
    command = cluster_command(config_path, overrides, hostfile=hostfile, master_addr=master_addr, master_port=master_port, runner=runner)
    command.insert(1, "--no_ssh_check")
    env = dict(os.environ)
    env["PATH"] = rank_environment(1)["PATH"]
    if "DS_ENV_FILE" not in env and not any(Path(place, ".deepspeed_env").exists() for place in (".", Path.home())):
        variables = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toolkit" / "deepspeed_env"
        export_environment(variables)
        env["DS_ENV_FILE"] = str(variables)
    if (launcher := shutil.which(command[0], path=env["PATH"])) is None:
        raise MachineError("the command deepspeed is not on the PATH", why="it starts the ranks of all hosts", fix="Install deepspeed.")
    process = subprocess.Popen([launcher, *command[1:]], env=env)
    previous = {s: signal.signal(s, lambda number, _: process.send_signal(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _exit_code(process.wait(), asked=None)
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def check_reachable(hosts: Iterable[str]) -> None:
    """Raise MachineError naming a host on which ssh cannot run a command without a password, as the launcher will have to."""
    if shutil.which("ssh") is None:
        raise MachineError("the command ssh is not on the PATH", why="other hosts are reached by it", fix="Install an ssh client.")
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_TIMEOUT_S}"]
    tries = {host: subprocess.Popen(["ssh", *options, host, "true"], stderr=subprocess.PIPE, text=True) for host in hosts}
    for host, process in tries.items():
        error = process.communicate()[1]
        if process.returncode != 0:
            raise MachineError(
                f"host {host} of the hostfile is not reachable by ssh",
                why=(error.strip().splitlines() or ["it gave no reason"])[-1].strip().rstrip("."),
                fix=f"Make `ssh {host} true` work without a password, or correct the name.",
            )


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots (ranks) of each host, in the order of the ranks; raises ConfigError naming the line that is wrong."""
    if not path.is_file():
        raise ConfigError(
            f"there is no hostfile {path}", fix="Copy launch/hostfile.example and name your hosts in it, one `HOST slots=RANKS` a line."
        )
    hosts: dict[str, int] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"the hostfile {path} cannot be read", why=why or str(error), fix="Check the path and its permissions.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)\s*", line.strip())
        if not match:
            raise ConfigError(
                f"{path}:{number} is {line.strip()!r}", why="a line names a host and its ranks", fix="Write it as `HOST slots=RANKS`."
            )
        if match[1] in hosts:
            raise ConfigError(f"{path}:{number} names {match[1]} a second time", fix="Give each host one line with all its slots.")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"the hostfile {path} names no host", fix="Write one `HOST slots=RANKS` a line.")
    return hosts


def _supervise(process: subprocess.Popen[bytes], received: list[int], *, module: str) -> int:
    """Wait for the launcher, passing on what arrives in `received`; returns its return code as Popen gives it."""
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
    """Unfold the launcher's return code: it ends with sys.exit(-n), seen as 256 - n, when a rank was ended by signal n.

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
    """Check a hostfile and write the file of exported variables, for launch/multi-node.sh."""
    parser = argparse.ArgumentParser(prog="python -m toolkit.cluster.launch", description=main.__doc__)
    parser.add_argument("--hostfile", type=Path, required=True)
    parser.add_argument("--env-file", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        read_hostfile(args.hostfile)
        export_environment(args.env_file)
    except ToolkitError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
