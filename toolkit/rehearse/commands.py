"""`toolkit rehearse` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, each replacing one key of the YAML")]


def rehearse(
    config: Annotated[Path, typer.Argument(help="the run's YAML")],
    hardware: Annotated[str, typer.Option(help="GPU:PER_NODExNODES, e.g. h100-80gb:8x128")],
    overrides: Overrides = None,
    ranks: Annotated[str, typer.Option(help="stages (one rank of each), worst, all, or numbers: 0,17")] = "stages",
    steps: Annotated[int, typer.Option(help="optimizer steps; the last one is described")] = 2,
    out: Annotated[Path | None, typer.Option(help="folder for a Chrome trace of each rank")] = None,
    processes: Annotated[int | None, typer.Option(help="ranks rehearsed at a time; default: one per core")] = None,
    hardware_file: Annotated[Path | None, typer.Option(help="YAML with more GPUs")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables")] = False,
) -> None:
    """Run the real program for any rank of any layout without a GPU: its memory, its messages, its
    waits, its time.
    """
    import json
    import shutil

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from toolkit.config.load import load_config
    from toolkit.cost import memory
    from toolkit.cost.workload import Workload
    from toolkit.errors import ConfigError
    from toolkit.hardware.catalogue import parse_hardware
    from toolkit.rehearse import match, play, session, show

    if steps < 1:
        raise ConfigError(f"--steps {steps} is too few", fix="Set it to 1 or more; from 2 on the optimizer's states are there.")
    cluster = parse_hardware(hardware, extra=hardware_file)
    loaded, layout = session.prepare(load_config(config, overrides or []), cluster)
    worst = lambda: memory.estimate(Workload.of(loaded, cluster.count), cluster).worst.stage
    chosen = session.choose_ranks(ranks, layout, worst=worst)
    jobs = [
        session.Job(
            config=loaded,
            world=cluster.count,
            rank=rank,
            steps=steps,
            whole=True,
            hardware=hardware,
            hardware_file=hardware_file.resolve() if hardware_file else None,
        )
        for rank in chosen
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        answers = session.run(jobs, processes=processes, progress=lambda what, share: bar.update(task, description=what, completed=share))
    session.refuse_errors(answers)
    cast = match.cast(layout, answers)
    findings = match.compare({rank: sent for rank, (_, sent) in cast.items()})
    findings += match.compare({rank: sent for rank, (_, sent) in match.cast(layout, answers, part="evaluation").items()})
    played = play.play(cast)
    played.findings = findings or played.findings  # what does not agree explains who waits
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for rank, spans in played.spans.items():
            (out / f"trace-rank{rank}.json").write_text(json.dumps(play.chrome_trace(spans)))
    if as_json:
        typer.echo(json.dumps(show.as_json(cluster, answers, played)))
    else:
        typer.echo(show.text(cluster, answers, played, width=max(120, shutil.get_terminal_size((150, 24)).columns)), nl=False)
    if played.findings or any(a["overdrawn"] for a in answers):
        raise typer.Exit(1)
