"""A chosen plan as files to start from: the run's YAML, the DeepSpeed JSON, the launch command and the whole ranking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolkit.config.load import dump_config
from toolkit.errors import ConfigError
from toolkit.files import write_durably
from toolkit.hardware.catalogue import Hardware
from toolkit.parallel import rules
from toolkit.parallel.deepspeed_json import deepspeed_config
from toolkit.plan.search import Plan
from toolkit.plan.tune import Question, planned
from toolkit.redact import redact


def launch_command(config_path: str, hardware: Hardware, gpus: int) -> str:
    """The shell command that starts a run, on one machine or on the hosts of a file; config_path: quoted for a shell."""
    if gpus <= hardware.gpus_per_node:
        return f"toolkit train {config_path} --num-procs {gpus}"
    return f"toolkit train {config_path} --hostfile hostfile"


def write_plan(question: Question, plan: Plan, out: Path, *, ranking: dict[str, Any]) -> list[Path]:
    """Write run.yaml, ds_config.json, launch.sh and tune.json into a folder; each file appears whole or not at all.

    Raises ConfigError where the folder cannot be written, LayoutError if the rules refuse the plan after all.
    """
    config = planned(question.config, plan)
    layout = rules.check(config, plan.gpus, machine=question.hardware.machine)
    node = question.hardware.gpus_per_node
    hosts = (
        ""
        if plan.gpus <= node
        else f"# hostfile: {plan.gpus // node} lines of `HOST slots={node}`; GLOO_SOCKET_IFNAME and others: launch/README.md\n"
    )
    command = launch_command('"$(dirname "$0")/run.yaml"', question.hardware, plan.gpus)
    name = " ".join(question.hardware.gpu.name.split())  # of a file of the user's: a line break would end the comment
    files = {
        "run.yaml": dump_config(config, open_data=True),
        "ds_config.json": json.dumps(deepspeed_config(config, layout), indent=2) + "\n",
        "launch.sh": f'#!/usr/bin/env bash\n# Written by toolkit tune: {plan.gpus} × {name}\n{hosts}exec {command} "$@"\n',
        "tune.json": json.dumps(ranking, indent=1) + "\n",
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_durably(out / name, redact(text))
        (out / "launch.sh").chmod(0o755)
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be written", why=error.strerror or str(error), fix="Name another folder.") from None
    return [out / name for name in files]
