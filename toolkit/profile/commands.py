"""`toolkit profile`: start ranks that measure themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.errors import ConfigError, at_least_one

Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, each replacing one key of the YAML")]


def profile(
    config: Annotated[Path, typer.Argument(help="the run's YAML")],
    overrides: Overrides = None,
    num_procs: Annotated[int | None, typer.Option(help="processes on this machine; default: its GPUs, or 1")] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps that are timed; three more warm up and measure memory and the trace")] = 3,
    memory_limit: Annotated[float | None, typer.Option(help="GiB a rank may take for model and training; default: all there is")] = None,
    calibration: Annotated[Path | None, typer.Option(help="what toolkit calibrate has measured, for the estimate")] = None,
) -> None:
    """Run a few steps and set memory, time and traffic against the estimate; writes RUN/profile.json."""
    import os

    from toolkit.cluster.environment import PLANNED, gpu_count
    from toolkit.cluster.launch import run_local
    from toolkit.config.load import load_config
    from toolkit.hardware import calibration as calibrated
    from toolkit.hardware.catalogue import parse_hardware
    from toolkit.train.resolve import resolve

    if steps < 1:
        raise ConfigError(f"--steps {steps} leaves nothing to time", fix="Set it to 1 or more.")
    if memory_limit is not None and not memory_limit > 0:
        raise ConfigError(f"--memory-limit {memory_limit:g} leaves nothing", fix="Set it to the GiB a rank may take.")
    at_least_one("--num-procs", num_procs)
    processes = num_procs or gpu_count() or 1
    # what is wrong is said before any process starts
    if calibration is not None:
        calibrated.load(calibration)
        if not gpu_count():
            calibrated.measured(parse_hardware(f"cpu:{processes}"), calibration)
    resolve(load_config(config, overrides or []), processes)
    extra = [f"--steps={steps}"] + ([f"--memory-limit={memory_limit}"] if memory_limit is not None else [])
    extra += [f"--calibration={calibration.absolute()}"] if calibration is not None else []
    # KINETO_LOG_LEVEL: torch's profiler would write its starts and stops between the tables
    environ = {"KINETO_LOG_LEVEL": "99", **os.environ, PLANNED: "1"}
    raise typer.Exit(run_local(config, [*(overrides or []), *extra], num_procs=processes, module="toolkit.profile", environ=environ))
