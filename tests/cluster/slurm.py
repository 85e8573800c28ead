"""A real Slurm on this machine: munged, slurmctld and slurmd of the system's packages, with one
node of two CPUs.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from toolkit.cluster.launch import free_port

PROGRAMS = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "setpriv": "util-linux"}


def missing() -> str:
    """Why Slurm cannot be started here, as a sentence for pytest.skip; empty when it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "Slurm's daemons need Linux and root"
    absent = sorted({package for name, package in PROGRAMS.items() if not _program(name)})
    return f"Slurm needs {', '.join(absent)}: apt-get install {' '.join(absent)}" if absent else ""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    folder: Path
    environment: dict[str, str]

    def call(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command that finds this Slurm."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)

    def wait(self, job: str, *, timeout: float = 900) -> tuple[str, str]:
        """Wait for a job to end; its state and exit code as Slurm gives them, such as COMPLETED and 0:0."""
        deadline = time.monotonic() + timeout
        while True:
            shown = dict(word.split("=", 1) for word in self.call("scontrol", "show", "job", job).stdout.split() if "=" in word)
            if shown.get("JobState") not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                return shown.get("JobState", ""), shown.get("ExitCode", "")
            if time.monotonic() > deadline:
                self.call("scancel", job)
                raise TimeoutError(f"job {job} is still {shown.get('JobState')}: {shown.get('Reason')}")
            time.sleep(0.2)


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Start the daemons under folder (absolute, short, empty), wait until the node is idle, yield,
    and end them.
    """
    host = socket.gethostname().split(".")[0]
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(
        f"ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser=root\nAuthType=auth/munge\nAuthInfo=socket={folder}/munge.socket\n"
        f"CredType=cred/munge\nCryptoType=crypto/munge\nSlurmctldPort={free_port()}\nSlurmdPort={free_port()}\n"
        "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nMpiDefault=none\nReturnToService=2\n"
        "SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nSchedulerParameters=batch_sched_delay=0,sched_interval=1\n"
        f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool\nSlurmctldPidFile={folder}/ctld.pid\nSlurmdPidFile={folder}/d.pid\n"
        f"NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN\nPartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP\n"
    )
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))} | {"SLURM_CONF": f"{folder}/slurm.conf"}
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munged += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for name, command in {"munged": munged, "slurmctld": ["slurmctld", "-D"], "slurmd": ["slurmd", "-D", "-N", host]}.items():
            with (folder / f"{name}.out").open("w") as out:
                words = ["setpriv", "--pdeathsig", "TERM", str(_program(command[0])), *command[1:]]
                running.append(subprocess.Popen(words, env=environment, stdout=out, stderr=out))
            if name == "munged":
                _until(lambda: (folder / "munge.socket").exists(), folder)
        here = Slurm(folder=folder, environment=environment)
        _until(lambda: here.call("sinfo", "-h", "-o", "%T").stdout.strip() == "idle", folder)
        yield here
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _until(ready: object, folder: Path, *, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while not ready():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise RuntimeError(
                "Slurm did not come up:\n" + "\n".join(f"{p.name}: {p.read_text()[-800:]}" for p in sorted(folder.glob("*.out")))
            )
        time.sleep(0.1)


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
