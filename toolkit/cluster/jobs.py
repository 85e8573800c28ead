"""What other launchers and schedulers are given to start the ranks: torchrun, mpirun, Slurm, Kubernetes."""

from __future__ import annotations

import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.cluster.hosts import read_hostfile
from toolkit.cluster.launch import TRAIN_MODULE
from toolkit.cluster.words import check_host
from toolkit.config.yaml_text import write_yaml
from toolkit.errors import ConfigError, MachineError

MASTER_PORT = 29500
STOP_EARLY_S = 300  # Slurm's warning before its time limit: long enough for one step and one checkpoint


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run and the processes it wants: nodes × ranks_per_node ranks of
    `python -m toolkit.train CONFIG key=value…`.
    """

    config: str
    overrides: tuple[str, ...]
    name: str
    nodes: int
    ranks_per_node: int
    gpus: bool
    python: str = sys.executable

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def program(self) -> list[str]:
        """The words of one rank, for launchers that give it RANK, WORLD_SIZE and LOCAL_RANK themselves."""
        return [self.python, "-u", "-m", TRAIN_MODULE, self.config, *self.overrides]


def torchrun_command(job: Job, *, master_addr: str | None, master_port: int = MASTER_PORT, restarts: int = 0) -> list[str]:
    """The same command for every node: the nodes meet at master_addr, in whatever order they come.

    One node needs no address. restarts: how often torchrun starts all ranks again after one has
    failed; they go on from the newest checkpoint.
    """
    command = [job.python, "-m", "torch.distributed.run", f"--nnodes={job.nodes}", f"--nproc-per-node={job.ranks_per_node}"]
    command.append(f"--max-restarts={restarts}")
    if master_addr is not None:
        check_host(master_addr, where="--master-addr")
    if job.nodes == 1 and master_addr is None:
        command.append("--standalone")
    elif master_addr is None:
        raise ConfigError(
            f"--torchrun on {job.nodes} nodes has no --master-addr",
            why="the nodes meet at one of them",
            fix="Set --master-addr to the first node's name or address, on every node.",
        )
    else:
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={master_addr}:{master_port}", f"--rdzv-id={job.name}"]
    return [*command, "-m", TRAIN_MODULE, job.config, *job.overrides]


def torchrun_place(master_addr: str, master_port: int = MASTER_PORT) -> list[str]:
    """What torchrun is told of the node it runs on: see address_towards()."""
    address, is_host = address_towards(master_addr, master_port)
    return [f"--local-addr={address}", f"--rdzv-conf=is_host={str(is_host).lower()}"]


def address_towards(master_addr: str, master_port: int = MASTER_PORT) -> tuple[str, bool]:
    """This node's address towards the others, and whether they meet here.

    torchrun would look its own name up instead, which on many systems gives 127.0.1.1, or nothing
    on the other nodes. Raises MachineError for a master_addr that is not known here.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
            probe.connect((master_addr, master_port))
            here, there = probe.getsockname()[0], probe.getpeername()[0]
    except OSError as error:
        raise MachineError(
            f"--master-addr {master_addr} cannot be reached from this node",
            why=error.strerror or str(error),
            fix="Name the first node as this one knows it.",
        ) from None
    is_host = here == there or there.startswith("127.")
    return (master_addr if is_host else here), is_host


def no_ssh_command(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    hostfile: Path,
    node_rank: int,
    master_addr: str | None = None,
    master_port: int = MASTER_PORT,
) -> list[str]:
    """DeepSpeed's command for one host of a hostfile, to be given on that host itself, where ssh
    between hosts is not allowed.
    """
    hosts = list(read_hostfile(hostfile))
    if master_addr:
        check_host(master_addr, where="--master-addr")
    if not 0 <= node_rank < len(hosts):
        raise ConfigError(
            f"--node-rank {node_rank} is not a host of {hostfile}",
            why=f"it names {len(hosts)}, counted from 0",
            fix=f"Set --node-rank to 0…{len(hosts) - 1}.",
        )
    return [
        *("deepspeed", "--no_ssh", f"--node_rank={node_rank}", "--hostfile", str(hostfile)),
        *("--master_addr", master_addr or hosts[0], "--master_port", str(master_port), "--no_local_rank", "--module"),
        *(TRAIN_MODULE, str(config), *overrides),
    ]


def slurm_script(job: Job, *, options: Sequence[str] = ()) -> str:
    """An sbatch script in which each task is one rank: no launcher and no ssh between the nodes.

    options: `key=value` or `key`, each a line `#SBATCH --key=value`. Raises ConfigError for one
    that would not stay one line. The ranks are told to stop STOP_EARLY_S seconds before the time
    limit, end at their next step and save.
    """
    asked = {"job-name": job.name, "nodes": job.nodes, "ntasks-per-node": job.ranks_per_node}
    asked |= {"gpus-per-node": job.ranks_per_node} if job.gpus else {}
    asked |= {"output": "slurm-%x-%j.log", "signal": f"TERM@{STOP_EARLY_S}"}
    for option in options:
        key, equals, value = option.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", key) or re.search(r"[\s\"'\\#]", value):
            raise ConfigError(f"--option {option!r} is not an option of sbatch", fix="Write it as key=value, for example partition=gpu.")
        asked[key] = value if equals else None
    lines = [f"#SBATCH --{key}" + ("" if value is None else f"={value}") for key, value in asked.items()]
    program = " ".join(shlex.quote(word) for word in job.program)
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "set -euo pipefail",
            'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            "export MASTER_ADDR=${hosts%%$'\\n'*} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
            "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
            "# each task is one rank and finds its place in Slurm's variables; one that fails ends the others",
            "srun --export=ALL --kill-on-bad-exit=1 bash -c \\",
            "    'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec \"$@\"' rank \\",
            f"    {program}",
            "",
        ]
    )


@dataclass(frozen=True, kw_only=True)
class Pods:
    """Where a Kubernetes job runs: its image, name space, volumes (claim, path) and variables."""

    image: str
    namespace: str | None = None
    runtime: str = "torch-distributed"
    volumes: tuple[tuple[str, str], ...] = ()
    variables: Mapping[str, str] | None = None

    @property
    def env(self) -> list[dict[str, str]]:
        return [{"name": name, "value": value} for name, value in sorted((self.variables or {}).items())]

    @property
    def mounts(self) -> list[dict[str, str]]:
        return [{"name": f"volume-{i}", "mountPath": path} for i, (_, path) in enumerate(self.volumes)]

    @property
    def claims(self) -> list[dict[str, Any]]:
        return [{"name": f"volume-{i}", "persistentVolumeClaim": {"claimName": claim}} for i, (claim, _) in enumerate(self.volumes)]


def trainjob(job: Job, pods: Pods) -> str:
    """A TrainJob of Kubeflow Trainer 2.3 (trainer.kubeflow.org/v1alpha1), whose runtime gives
    torchrun its nodes and place.
    """
    trainer: dict[str, Any] = {
        "image": pods.image,
        "numNodes": job.nodes,
        "numProcPerNode": job.ranks_per_node,
        "command": ["torchrun", "-m", TRAIN_MODULE],
        "args": [_literal(word) for word in (job.config, *job.overrides)],
    }
    if job.gpus:
        trainer["resourcesPerNode"] = {"limits": {"nvidia.com/gpu": job.ranks_per_node}}
    if pods.env:
        trainer["env"] = pods.env
    spec: dict[str, Any] = {"runtimeRef": {"name": pods.runtime}, "trainer": trainer}
    if pods.volumes:
        patch = {"volumes": pods.claims, "containers": [{"name": "node", "volumeMounts": pods.mounts}]}
        node = {"name": "node", "template": {"spec": {"template": {"spec": patch}}}}
        spec["runtimePatches"] = [
            {"manager": "toolkit.launch/volumes", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}}}
        ]
    return write_yaml({"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": _metadata(job, pods), "spec": spec})


def mpijob(job: Job, pods: Pods) -> str:
    """An MPIJob of the MPI operator (kubeflow.org/v2beta1): mpirun in a launcher pod starts the
    ranks in the worker pods.
    """
    address = f"{_pod_name(job.name)}-worker-0.{_pod_name(job.name)}"
    variables = {"MASTER_ADDR": address, "MASTER_PORT": str(MASTER_PORT), **(pods.variables or {})}
    exports = [word for name, value in variables.items() for word in ("-x", f"{name}={value}")]
    command = [_literal(word) for word in ("mpirun", "-n", str(job.ranks), *exports, "python3", *job.program[1:])]
    worker: dict[str, Any] = {"name": "worker", "image": pods.image, "command": ["/usr/sbin/sshd"], "args": ["-De"]}
    if job.gpus:
        worker["resources"] = {"limits": {"nvidia.com/gpu": job.ranks_per_node}}
    if pods.mounts:
        worker["volumeMounts"] = pods.mounts
    workers = {"containers": [worker]} | ({"volumes": pods.claims} if pods.volumes else {})
    launcher = {"containers": [{"name": "launcher", "image": pods.image, "command": command}]}
    return write_yaml(
        {
            "apiVersion": "kubeflow.org/v2beta1",
            "kind": "MPIJob",
            "metadata": _metadata(job, pods),
            "spec": {
                "slotsPerWorker": job.ranks_per_node,
                "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": 0},
                "mpiReplicaSpecs": {
                    "Launcher": {"replicas": 1, "template": {"spec": launcher}},
                    "Worker": {"replicas": job.nodes, "template": {"spec": workers}},
                },
            },
        }
    )


def _literal(word: str) -> str:
    """A word in which Kubernetes replaces no $(VARIABLE)."""
    return word.replace("$(", "$$(")


def _metadata(job: Job, pods: Pods) -> dict[str, str]:
    return {"name": _pod_name(job.name)} | ({"namespace": pods.namespace} if pods.namespace else {})


def _pod_name(name: str) -> str:
    """A name that Kubernetes takes: small letters, digits and dashes, a letter first, at most 50 so
    that pods can add theirs.
    """
    clean = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50].rstrip("-")
    return clean if clean[:1].isalpha() else f"run-{clean}".rstrip("-")
