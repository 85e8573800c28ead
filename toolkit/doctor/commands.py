"""The command `toolkit doctor`: what is wrong with the hosts, before a run costs GPU hours."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

NO = 1  # exit code where something is red
MASTER_PORT = 29500


def doctor(
    config: Annotated[Path | None, typer.Argument(help="the run's YAML, to hold the hosts against what it needs")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, each replacing one key of the YAML")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="`HOST slots=RANKS` a line; default: this machine alone")] = None,
    num_procs: Annotated[int | None, typer.Option(help="without a hostfile: processes on this machine; default: its GPUs, or 1")] = None,
    master_port: Annotated[int, typer.Option(help="the TCP port where the ranks are to meet")] = MASTER_PORT,
    build: Annotated[bool, typer.Option("--build", help="also compile the extensions that the config needs, on every host")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
) -> None:
    """Look at every host of a run before it starts: what is wrong, and how to mend it; exit code 1
    where something is red.
    """
    from toolkit.cluster.environment import gpu_count
    from toolkit.cluster.hosts import LOCAL, read_hostfile
    from toolkit.config.load import load_config
    from toolkit.doctor.checks import RED, judge
    from toolkit.doctor.network_checks import ALL
    from toolkit.doctor.session import examine
    from toolkit.doctor.show import doctor_json, doctor_text
    from toolkit.errors import ConfigError, at_least_one

    at_least_one("--num-procs", num_procs)
    if hostfile is not None and num_procs is not None:
        raise ConfigError("--num-procs beside --hostfile", why="the hostfile says what runs where", fix="Leave one of the two out.")
    if config is not None and "=" in config.name and not config.exists():
        raise ConfigError(f"{str(config)!r} stands where CONFIG does", why="overrides follow a config", fix="Name the YAML first.")
    loaded = None if config is None else load_config(config, overrides or [])
    slots = {"localhost": num_procs or gpu_count() or 1} if hostfile is None else read_hostfile(hostfile)
    local = slots.keys() <= LOCAL
    look = examine(slots, config=loaded, local=local, port=master_port, build=build)
    findings = judge(look, ALL)
    if as_json:
        typer.echo(json.dumps(doctor_json(look, findings), indent=1))
    else:
        terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size((160, 24)).columns if terminal else 160
        typer.echo(doctor_text(look, findings, width=width, color=terminal), nl=False)
    raise typer.Exit(NO if any(f.status == RED for f in findings) else 0)
