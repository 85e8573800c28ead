"""`toolkit tune` on the command line; the planner itself is loaded when it runs."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.errors import ConfigError

if TYPE_CHECKING:
    from toolkit.plan.tune import Question

Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, each replacing one key of the YAML; a degree set here is fixed")
]
OBJECTIVES = ("tokens/s", "cost", "fewest-gpus")


def tune(
    config: Annotated[Path, typer.Argument(help="the run's YAML: model, global batch and sequence")],
    hardware: Annotated[str, typer.Option(help="GPU:PER_NODExNODES, e.g. h100-80gb:8x4")],
    overrides: Overrides = None,
    fix: Annotated[list[str] | None, typer.Option(help="hold an axis: parallel.tp=2, dp=8, zero.stage=1,2; can be repeated")] = None,
    objective: Annotated[str, typer.Option(help="what counts: tokens/s, cost or fewest-gpus")] = "tokens/s",
    max_gpus: Annotated[int | None, typer.Option(help="use at most so many GPUs")] = None,
    max_step: Annotated[float | None, typer.Option(help="slowest step allowed, seconds")] = None,
    max_cost: Annotated[float | None, typer.Option(help="highest price allowed of the whole run (train.steps); needs --price")] = None,
    price: Annotated[float | None, typer.Option(help="price of one GPU for one hour")] = None,
    risk: Annotated[float, typer.Option(help="probability of running out of memory that a plan may have")] = 0.1,
    headroom: Annotated[float | None, typer.Option(help="GiB of each GPU to leave free; default: what --risk asks for")] = None,
    host_gib: Annotated[float | None, typer.Option(help="RAM of a node for offload, GiB; default: the catalogue's")] = None,
    top: Annotated[int, typer.Option(help="plans to list")] = 10,
    what_if: Annotated[bool, typer.Option(help="also answer what other hardware or sequences would change")] = True,
    out: Annotated[Path | None, typer.Option(help="folder for run.yaml, ds_config.json, launch.sh and tune.json of the best plan")] = None,
    rehearse: Annotated[int, typer.Option(help="rehearse the best so many plans first, and drop those that would not run")] = 0,
    trials: Annotated[int, typer.Option(help="run the best so many plans here and rank them by measurement")] = 0,
    trial_steps: Annotated[int, typer.Option(help="optimizer steps of a trial")] = 5,
    trial_deadline: Annotated[float, typer.Option(help="seconds after which a trial is ended")] = 600.0,
    trial_dir: Annotated[
        Path | None, typer.Option(help="where trials and their results are kept; default: OUT/trials or tune-trials")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="scalars of your own, from toolkit calibrate")] = None,
    hardware_file: Annotated[Path | None, typer.Option(help="YAML with more GPUs")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables")] = False,
) -> None:
    """Choose TP, PP, VPP, CP, DP, ZeRO, offload, recompute and micro-batch for a config on a cluster, without a GPU."""
    import gc
    import json
    import shlex
    import shutil

    from toolkit.plan.tune import tune as answer_to
    from toolkit.plan.tune_show import trials_text, tune_json, tune_text
    from toolkit.plan.write_plan import launch_command, write_plan

    width = max(120, shutil.get_terminal_size((150, 24)).columns)
    if as_json:
        log_to_stderr()
    for name, value, least in (
        ("--top", top, 1),
        ("--rehearse", rehearse, 0),
        ("--trials", trials, 0),
        ("--trial-steps", trial_steps, 2),
        ("--trial-deadline", trial_deadline, 1),
    ):
        if value < least:
            raise ConfigError(f"{name} {value:g} is too few", fix=f"Set it to {least} or more.")
    question = _question(config, overrides or [], hardware, hardware_file, fix or [], calibration)
    if objective not in OBJECTIVES:
        raise ConfigError(f"--objective {objective!r} is not known", fix=f"Use one of {', '.join(OBJECTIVES)}.")
    question.objective, question.max_gpus = objective, max_gpus  # type: ignore[assignment]
    limits = question.limits
    limits.risk, limits.headroom = risk, None if headroom is None else headroom * 2**30
    limits.max_step_s, limits.max_cost, limits.price = max_step, max_cost, price
    if host_gib is not None:
        question = question.with_host_gib(host_gib)
    gc.freeze()  # a search makes many objects; modules, which stay, need not be looked through for garbage each time
    answer, rehearsed = answer_to(question, top=max(top, trials, rehearse), what_if=what_if and not rehearse), None
    if rehearse:
        from toolkit.plan.rehearsals import rehearse_plans
        from toolkit.plan.tune import what_ifs

        rehearsed = rehearse_plans(answer, rehearse, hardware_file=hardware_file)
        answer.what_if = what_ifs(answer) if what_if else []
    if not as_json:
        typer.echo(tune_text(answer, rehearsed=rehearsed, width=width), nl=False)
    chosen, measured = answer.best, None
    if trials:
        from toolkit.plan.trials import run_trials

        place = trial_dir or (out / "trials" if out else Path("tune-trials"))
        measured = run_trials(question, answer.result.plans[:trials], place, steps=trial_steps, deadline_s=trial_deadline)
        if not as_json:
            typer.echo(trials_text(answer, measured, width=width), nl=False)
        if measured[0].step_s is not None:
            chosen = measured[0].plan
    ranking = tune_json(answer, trials=measured, rehearsed=rehearsed)
    if as_json:
        typer.echo(json.dumps(ranking, indent=1))
    if measured is not None and measured[0].step_s is None:
        raise ConfigError("no trial ran", why=measured[0].reason, fix=f"Look at log.txt in the folders of {place}, and mend what it says.")
    if out is not None:
        write_plan(question, chosen, out, ranking=ranking)
        if not as_json:
            typer.echo(
                f"written to {out}; start it with: {launch_command(shlex.quote(str(out / 'run.yaml')), question.hardware, chosen.gpus)}"
            )


def _question(
    config: Path, overrides: list[str], hardware: str, hardware_file: Path | None, fix: list[str], calibration: Path | None
) -> Question:
    from toolkit.config.load import load_config
    from toolkit.plan.ask import make_question
    from toolkit.plan.space import is_axis

    fixed = [*filter(is_axis, overrides), *fix]
    return make_question(load_config(config, overrides), hardware, fix=fixed, hardware_file=hardware_file, calibration=calibration)


def log_to_stderr() -> None:
    """Send what is logged to stderr: beside the JSON on stdout, not in it."""
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
