"""The command `toolkit launch`: start a run on many nodes, or print what would start it."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from toolkit.cluster.environment import gpu_count
from toolkit.cluster.hosts import read_hostfile
from toolkit.cluster.jobs import MASTER_PORT, Job, Pods, mpijob, no_ssh_command, slurm_script, torchrun_command, torchrun_place, trainjob
from toolkit.cluster.launch import cluster_command, run_on_hosts
from toolkit.cluster.stalls import STALLED
from toolkit.config.load import load_config
from toolkit.errors import ConfigError, MachineError, at_least_one
from toolkit.parallel.rules import Machine, check

LOST_AFTER_S = 10.0
RUNNERS = ("pdsh", "openmpi")
KINDS = ("trainjob", "mpijob")
# options that mean something for some ways of starting only; elsewhere they are refused, since
# nothing is ignored in silence
BELONGS = {
    "--runner": ("--hostfile",),
    "--node-rank": ("--hostfile",),
    "--nodes": ("--slurm", "--k8s", "--torchrun"),
    "--ranks-per-node": ("--slurm", "--k8s", "--torchrun"),
    "--master-addr": ("--hostfile", "--torchrun"),
    "--master-port": ("--hostfile", "--torchrun"),
    "--restarts": ("--torchrun",),
    "--elastic": ("--hostfile",),
    "--option": ("--slurm",),
    "--cpu": ("--slurm", "--k8s"),
    "--image": ("--k8s",),
    "--kind": ("--k8s",),
    "--namespace": ("--k8s",),
    "--volume": ("--k8s",),
    "--env": ("--k8s",),
}


def launch(
    config: Annotated[Path, typer.Argument(help="the run's YAML, as every node sees it")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, each replacing one key of the YAML")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="`HOST slots=RANKS` a line: DeepSpeed's launcher over ssh")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="an sbatch script, one task a rank")] = False,
    k8s: Annotated[bool, typer.Option("--k8s", help="a job for Kubernetes with Kubeflow")] = False,
    torchrun: Annotated[bool, typer.Option("--torchrun", help="torchrun: give the same command on every node")] = False,
    nodes: Annotated[int | None, typer.Option(help="nodes of the job; default 1")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="ranks (GPUs) of a node; default: this machine's GPUs, or 1")] = None,
    runner: Annotated[str | None, typer.Option(help="with --hostfile: pdsh (default) or openmpi")] = None,
    node_rank: Annotated[int | None, typer.Option(help="with --hostfile: start this host's ranks alone, without ssh")] = None,
    master_addr: Annotated[str | None, typer.Option(help="where the ranks meet; default: the first host")] = None,
    master_port: Annotated[int | None, typer.Option(help="a free TCP port there; default 29500")] = None,
    restarts: Annotated[int | None, typer.Option(help="torchrun: how often all ranks are started again after a failure")] = None,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="with --hostfile: go on without a host that is lost, and with it once it is back")
    ] = False,
    min_nodes: Annotated[int | None, typer.Option(help="elastic: fewest hosts to go on with; default 1")] = None,
    spares: Annotated[int | None, typer.Option(help="elastic: the last K hosts wait to take a lost one's place; default 0")] = None,
    lost_after: Annotated[float | None, typer.Option(help="elastic: seconds of silence after which a host is lost; default 10")] = None,
    option: Annotated[list[str] | None, typer.Option(help="an option of sbatch, as partition=gpu; may be repeated")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="ask the scheduler for no GPUs")] = False,
    image: Annotated[str | None, typer.Option(help="Kubernetes: the image, with the toolkit in it")] = None,
    kind: Annotated[str | None, typer.Option(help="Kubernetes: trainjob (default) or mpijob")] = None,
    namespace: Annotated[str | None, typer.Option(help="Kubernetes: the name space; default: kubectl's")] = None,
    volume: Annotated[list[str] | None, typer.Option(help="Kubernetes: CLAIM:/PATH, a volume claim and its place; may be repeated")] = None,
    env: Annotated[list[str] | None, typer.Option(help="Kubernetes: NAME=VALUE for the ranks; may be repeated")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the command, script or job, and start nothing")] = False,
) -> None:
    """Start a run on many nodes: over ssh, by Slurm, on Kubernetes, or by torchrun."""
    given = {
        **{"--runner": runner, "--node-rank": node_rank, "--nodes": nodes, "--ranks-per-node": ranks_per_node, "--restarts": restarts},
        **{"--master-addr": master_addr, "--master-port": master_port, "--option": option, "--cpu": cpu or None, "--image": image},
        **{"--elastic": elastic or None},
        **{"--kind": kind, "--namespace": namespace, "--volume": volume, "--env": env},
    }
    way = _one_way({"--hostfile": hostfile is not None, "--slurm": slurm, "--k8s": k8s, "--torchrun": torchrun})
    _only_its_own(way, given)
    at_least_one("--nodes", nodes)
    at_least_one("--ranks-per-node", ranks_per_node)
    if restarts is not None and restarts < 0:
        raise ConfigError(f"--restarts {restarts} is less than 0", fix="Set --restarts to 0 or more.")
    words = overrides or []
    _with_elastic(elastic, {"--min-nodes": min_nodes, "--spares": spares, "--lost-after": lost_after})
    if hostfile is not None and elastic:
        _only_its_own("--hostfile --elastic", {k: v for k, v in given.items() if k != "--elastic"})
        _elastic(
            config, words, hostfile, min_nodes=min_nodes or 1, spares=spares or 0, lost_after=lost_after or LOST_AFTER_S, dry_run=dry_run
        )
        return
    if hostfile is not None:
        _on_hosts(
            config,
            words,
            hostfile,
            runner=_one_of("--runner", runner or RUNNERS[0], RUNNERS),
            node_rank=node_rank,
            address=master_addr,
            port=master_port or MASTER_PORT,
            dry_run=dry_run,
        )
        return
    if image is None and k8s:
        raise ConfigError("--k8s has no --image", why="the pods run it", fix="Set --image to one that holds the toolkit.")
    kind = _one_of("--kind", kind or KINDS[0], KINDS)
    pods = Pods(image=image or "", namespace=namespace, volumes=_volumes(volume or []), variables=_variables(env or []))
    job = _job(config, words, nodes=nodes or 1, ranks_per_node=ranks_per_node or gpu_count() or 1, gpus=not cpu)
    if torchrun:
        port = master_port or MASTER_PORT
        command = torchrun_command(job, master_addr=master_addr, master_port=port, restarts=restarts or 0)
        if master_addr is not None and not dry_run:
            command[3:3] = torchrun_place(master_addr, port)
        _run(command, dry_run=dry_run)
    elif slurm:
        _submit(slurm_script(job, options=option or []), to=["sbatch"], dry_run=dry_run)
    else:
        _submit(trainjob(job, pods) if kind == "trainjob" else mpijob(job, pods), to=["kubectl", "apply", "-f", "-"], dry_run=dry_run)


def _one_way(ways: dict[str, bool]) -> str:
    chosen = [way for way, is_chosen in ways.items() if is_chosen]
    if len(chosen) != 1:
        raise ConfigError(
            f"{' and '.join(chosen) or 'no way to start'} {'are' if chosen else 'is'} given",
            why="a run is started in one way",
            fix=f"Set one of {', '.join(ways)}.",
        )
    return chosen[0]


def _only_its_own(way: str, given: dict[str, Any]) -> None:
    """Refuse options of other ways to start."""
    for option, value in given.items():
        if value is not None and way not in BELONGS[option]:
            raise ConfigError(
                f"{option} beside {way}", why=f"it belongs to {', '.join(BELONGS[option])}", fix=f"Leave {option} or {way} out."
            )


def _with_elastic(elastic: bool, given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value is not None and not elastic:
            raise ConfigError(
                f"{option} without --elastic", why="only an elastic run loses or gains hosts", fix=f"Leave {option} out, or add --elastic."
            )
        if value is not None and value < (0 if option == "--spares" else 1):
            raise ConfigError(f"{option} {value:g} is too small", fix=f"Set {option} to {0 if option == '--spares' else 1} or more.")


def _elastic(path: Path, overrides: list[str], hostfile: Path, *, min_nodes: int, spares: int, lost_after: float, dry_run: bool) -> None:
    """Check what can be checked beforehand, then supervise the run to its end."""
    from toolkit.supervise.layouts import Layouts
    from toolkit.supervise.run import Supervisor
    from toolkit.train.resolve import resolve

    hosts = read_hostfile(hostfile)
    config = load_config(path, overrides)
    active = len(hosts) - spares
    if len(set(hosts.values())) > 1:
        raise ConfigError(f"{hostfile} gives hosts different slots", why="one host takes another one's place", fix="Give all the same.")
    if not min_nodes <= active:
        raise ConfigError(
            f"--min-nodes {min_nodes} is more than the {active} of {len(hosts)} hosts that are no spares",
            fix="Lower --min-nodes or --spares.",
        )
    if not config.checkpoint.every:
        raise ConfigError(
            "--elastic with checkpoint.every=0", why="a run goes on from a checkpoint", fix="Set checkpoint.every, say to 100."
        )
    if config.checkpoint.resume == "never":
        raise ConfigError(
            "--elastic with checkpoint.resume=never", why="a run goes on from a checkpoint", fix="Set checkpoint.resume=auto."
        )
    slots = next(iter(hosts.values()))
    layouts = Layouts(path, overrides, slots=slots, hosts_of_config=active)
    plans = {nodes: layouts.on(nodes) for nodes in range(active, min_nodes - 1, -1)}  # a run that could not go on is refused now
    if dry_run:
        for nodes, start in plans.items():
            typer.echo(
                f"{nodes} hosts: {start.nodes * slots} ranks, {start.described}" + (f" ({' '.join(start.words)})" if start.words else "")
            )
        return
    resolved = resolve(config, active * slots)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    supervisor = Supervisor(path, overrides, resolved.config, hosts, min_nodes=min_nodes, spares=spares, lost_after_s=lost_after)
    raise typer.Exit(supervisor.supervise())


def _one_of(option: str, value: str, values: Sequence[str]) -> str:
    if value not in values:
        raise ConfigError(f"{option} {value!r} is not known", fix=f"Set it to {' or '.join(values)}.")
    return value


def _job(path: Path, overrides: Sequence[str], *, nodes: int, ranks_per_node: int, gpus: bool) -> Job:
    """The job of a config that the rules accept for that many ranks; its data and this machine are
    the nodes' own affair.
    """
    config = load_config(path, overrides)
    check(config, nodes * ranks_per_node, machine=Machine(cuda=gpus, transformer_engine=gpus))
    return Job(
        config=str(path),
        overrides=tuple(overrides),
        name=_plain(config.run.dir.name),
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        gpus=gpus,
    )


def _plain(name: str) -> str:
    """A run's name as a scheduler takes it: letters, digits, dots, dashes and underscores."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name) or "run"


def _on_hosts(
    path: Path, overrides: list[str], hostfile: Path, *, runner: str, node_rank: int | None, address: str | None, port: int, dry_run: bool
) -> None:
    from toolkit.train.console import watched
    from toolkit.train.resolve import machine, resolve  # loads numpy, which `toolkit tune` starts without

    hosts = read_hostfile(hostfile)
    ranks = sum(hosts.values())
    if node_rank is not None:
        command = no_ssh_command(path, overrides, hostfile=hostfile, node_rank=node_rank, master_addr=address, master_port=port)
        check(load_config(path, overrides), ranks, machine=machine())
        _run(command, dry_run=dry_run)
        return
    command = cluster_command(path, overrides, hostfile=hostfile, master_addr=address, master_port=port, runner=runner)
    if dry_run:
        check(load_config(path, overrides), ranks, machine=machine())
        typer.echo(shlex.join(command))
        return
    folder = resolve(load_config(path, overrides), ranks).config.run.dir
    run = partial(
        run_on_hosts, path, overrides, hostfile=hostfile, master_addr=address, master_port=port, runner=runner, stalled=folder / STALLED
    )
    look = ["toolkit", "doctor", str(path), *overrides, "--hostfile", str(hostfile), "--master-port", str(port)]
    raise typer.Exit(watched(run, folder=folder, doctor=look))


def _run(command: list[str], *, dry_run: bool) -> None:
    if dry_run:
        typer.echo(shlex.join(command))
        return
    program = _program(command[0])
    os.execv(program, command)  # the launcher takes this process's place, so that signals and the exit code are its own


def _submit(text: str, *, to: list[str], dry_run: bool) -> None:
    if dry_run:
        typer.echo(text, nl=False)
        return
    raise typer.Exit(subprocess.run([_program(to[0]), *to[1:]], input=text, text=True).returncode)


def _program(name: str) -> str:
    if (program := shutil.which(name)) is None:
        raise MachineError(
            f"the command {name} is not on the PATH",
            why="it starts the run",
            fix=f"Install it, or look at --dry-run and give that to {name} elsewhere.",
        )
    return program


def _volumes(words: Sequence[str]) -> tuple[tuple[str, str], ...]:
    pairs = [word.partition(":") for word in words]
    for claim, colon, path in pairs:
        if not (claim and colon and path.startswith("/")):
            raise ConfigError(f"--volume {claim}{colon}{path} is not CLAIM:/PATH", fix="Write it like data:/data.")
    return tuple((claim, path) for claim, _, path in pairs)


def _variables(words: Sequence[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    for name, equals, _ in pairs:
        if not (name.isidentifier() and equals):
            raise ConfigError(f"--env {name!r} is not NAME=VALUE", fix="Write it like NCCL_DEBUG=INFO.")
    return {name: value for name, _, value in pairs}
