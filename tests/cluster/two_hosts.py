"""Two hosts on one machine: Linux namespaces joined by a bridge, with sshd and pdsh, so that the
cluster's own commands run.

Each host has its own network, process ids, host name, /run, /etc/hosts and ssh client
configuration; the file system, and with it the repository and the interpreter, is shared as on a
cluster. The bridge lives in a third namespace: nothing is added to the machine's network, and no
traffic leaves. The namespaces have no name and hold no process but ours, so the kernel removes
them, and all that runs in them, as soon as this process ends in whatever way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from toolkit.cluster.launch import cluster_command, export_environment

REPOSITORY = Path(__file__).resolve().parents[2]
ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
MORE_ADDRESSES = {**ADDRESSES, "host-c": "10.77.0.3"}
INTERFACE = "eth0"
PROGRAMS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "pdsh": "pdsh"}
PROGRAMS |= {"unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux", "mount": "mount", "pkill": "procps"}
UNSHARE = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]


def missing() -> str:
    """Why two hosts cannot be built here, as a sentence for pytest.skip; empty when they can."""
    if sys.platform != "linux":
        return f"two hosts need Linux namespaces, this is {sys.platform}"
    if os.geteuid() != 0:
        return "two hosts need root, to create network namespaces"
    if absent := [name for name in PROGRAMS if not _program(name)]:
        return f"two hosts need {', '.join(absent)}: apt-get install {' '.join(sorted({PROGRAMS[name] for name in absent}))}"
    trial = subprocess.run(
        [*UNSHARE, "sh", "-c", "ip link add br0 type bridge && ip link add port0 type veth peer name port1"], capture_output=True, text=True
    )
    if trial.returncode:
        return f"two hosts need network namespaces with a bridge, and this machine refuses: {trial.stderr.strip() or trial.returncode}"
    return ""


@dataclass(frozen=True, kw_only=True)
class TwoHosts:
    """The running hosts `host-a` (where commands are given, rank 0) and `host-b`."""

    folder: Path
    hostfile: Path
    environment: dict[str, str]
    pids: dict[str, int]

    def run(self, module: str, args: Sequence[str], *, timeout: float = 900, environ: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Run a module's ranks, one on each host, by the `deepspeed` launcher given on host-a;
        returns exit code and output.
        """
        return self._finish(self.launch(module, args, environ=environ), timeout=timeout)

    def launch(self, module: str, args: Sequence[str], *, environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start what run() runs, and return without waiting for it; args: the config's path and the
        overrides.
        """
        command = cluster_command(args[0], args[1:], hostfile=self.hostfile, master_addr=ADDRESSES["host-a"], module=module)
        variables = self.folder / "deepspeed_env"
        env = {**self.environment, **(environ or {})}
        export_environment(variables, environ=env)
        return self.start(command, environ={**env, "DS_ENV_FILE": str(variables)})

    def shell(
        self, command: Sequence[str], *, host: str = "host-a", timeout: float = 300, environ: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Run any command on one host, in the repository's root; exit code (124 after the timeout)
        and stdout with stderr.
        """
        return self._finish(self.start(command, host=host, environ=environ), timeout=timeout)

    def start(self, command: Sequence[str], *, host: str = "host-a", environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command on one host and return without waiting for it."""
        env = {**self.environment, **(environ or {})}
        inside = ["nsenter", "--target", str(self.pids[host]), "--mount", "--uts", "--net", "--pid", f"--wd={REPOSITORY}", *command]
        return subprocess.Popen(inside, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True)

    def _finish(self, process: subprocess.Popen[str], *, timeout: float) -> tuple[int, str]:
        try:
            output, _ = process.communicate(timeout=timeout)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            self.kill_all()
            output, _ = process.communicate()
            return 124, f"{output}\nended after {timeout} s"

    def processes(self, host: str) -> list[psutil.Process]:
        """What runs on a host, sshd (its first process) left out."""
        space, found = os.readlink(f"/proc/{self.pids[host]}/ns/pid"), []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == space and process.pid != self.pids[host]:
                    found.append(process)
        return found

    def kill_all(self) -> None:
        """End everything started on both hosts; the hosts stay up."""
        for host in self.pids:
            for process in self.processes(host):
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def link(self, host: str, *, up: bool) -> None:
        """Pull or plug in a host's network cable."""
        _inside(self.pids[host], f"ip link set {INTERFACE} {'up' if up else 'down'}")


@contextmanager
def two_hosts(folder: Path, addresses: Mapping[str, str] = ADDRESSES) -> Iterator[TwoHosts]:
    """Build the hosts, their keys and configuration under folder (absolute, empty), yield them, and
    take them down.
    """
    _write_configuration(folder, addresses)
    running: list[subprocess.Popen[str]] = []
    try:
        switch = _first_process(running, "ip link add br0 type bridge && ip link set br0 up", "sleep infinity", log=folder / "switch.log")
        pids = {}
        for host in addresses:
            pids[host] = _first_process(
                running, _host_setup(folder, host=host), f"{_program('sshd')} -D -e -f {folder}/sshd_config", log=folder / f"{host}.log"
            )
            _plug_in(switch, pids[host], host=host, address=addresses[host])
        hosts = TwoHosts(folder=folder, hostfile=folder / "hostfile", environment=_environment(), pids=pids)
        _wait_for_ssh(hosts)
        yield hosts
    finally:
        for process in reversed(running):
            process.kill()  # its namespaces go with it
            process.wait()


def _write_configuration(folder: Path, addresses: Mapping[str, str]) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    public = (folder / "key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{host},{address} {public}" for host, address in addresses.items()))
    (folder / "hostfile").write_text("".join(f"{host} slots=1\n" for host in addresses))
    (folder / "sshd_config").write_text(
        f"Port 22\nHostKey {folder}/key\nAuthorizedKeysFile {folder}/key.pub\nStrictModes no\nPermitRootLogin prohibit-password\n"
        f"PasswordAuthentication no\nUsePAM no\nPidFile none\nMaxStartups 50\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/key\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n  StrictHostKeyChecking yes\n"
    )
    for host in addresses:
        # as many distributions have it, and the reason why gloo must be told its interface
        lines = ["127.0.0.1 localhost", f"127.0.1.1 node-{host}", *(f"{address} {name}" for name, address in addresses.items())]
        (folder / f"hosts-{host}").write_text("".join(f"{line}\n" for line in lines))


def _host_setup(folder: Path, *, host: str) -> str:
    steps = [f"hostname node-{host}", "ip link set lo up", "mount -t tmpfs run /run", "mkdir -m 755 /run/sshd"]
    steps += [f"mount --bind {folder}/hosts-{host} /etc/hosts", f"mount --bind {folder}/ssh_config /etc/ssh/ssh_config"]
    return " && ".join(steps)


def _first_process(running: list[subprocess.Popen[str]], setup: str, last: str, *, log: Path) -> int:
    """Start new namespaces, set them up and leave `last` as their process 1; returns its pid as
    seen from here.
    """
    with log.open("w") as out:
        process = subprocess.Popen(
            [*UNSHARE, "sh", "-c", f"{setup} && touch {log}.ready && exec {last}"], stdout=out, stderr=out, text=True
        )
    running.append(process)
    deadline = time.monotonic() + 120
    while not Path(f"{log}.ready").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"a host did not come up: {log.read_text()}")
        time.sleep(0.02)
    return psutil.Process(process.pid).children()[0].pid


def _plug_in(switch: int, host_pid: int, *, host: str, address: str) -> None:
    _inside(switch, f"ip link add port-{host} type veth peer name {INTERFACE} netns {host_pid}")
    _inside(switch, f"ip link set port-{host} master br0 up")
    _inside(host_pid, f"ip addr add {address}/24 dev {INTERFACE} && ip link set {INTERFACE} up")


def _inside(pid: int, command: str) -> None:
    # the mount namespace stays ours: /proc in there would name other processes
    done = subprocess.run(["nsenter", "--target", str(pid), "--net", "sh", "-c", command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{command}` failed: {done.stderr.strip()}")


def _wait_for_ssh(hosts: TwoHosts) -> None:
    for host in hosts.pids:
        for _ in range(50):
            code, output = hosts.shell(["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=2", host, "true"])
            if code == 0:
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"ssh to {host} failed: {output}")


def _environment() -> dict[str, str]:
    """A user's login on host-a: this interpreter first on the PATH, the toolkit importable, gloo
    told its interface.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "GLOO_", "LOCAL_", "PDSH_", "DS_", "SLURM_"))}
    for name in ("RANK", "WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE"):
        env.pop(name, None)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"])
    env["PYTHONPATH"] = str(REPOSITORY)
    return {**env, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": INTERFACE}


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
