"""`toolkit calibrate` on the command line; what measures and fits is loaded when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.errors import ConfigError


def calibrate(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="run folders of toolkit profile or toolkit train; none: measure this machine's CPU")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="GPU:PER_NODExNODES they ran on; default: what the run folder records")] = None,
    hardware_file: Annotated[Path | None, typer.Option(help="YAML with more GPUs")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="fp32 or bf16, of a CPU that is measured; can be repeated")] = None,
    out: Annotated[Path, typer.Option(help="YAML that estimate and tune take as --calibration")] = Path("calibration.yaml"),
) -> None:
    """Measure this machine's CPU, or fit the planner's one scalar per GPU and precision to your own runs."""
    if runs:
        if precision:
            raise ConfigError("--precision beside run folders", why="the runs say their own", fix="Leave it out.")
        _fit(runs, hardware, hardware_file, out)
    else:
        for name, value in (("--hardware", hardware), ("--hardware-file", hardware_file)):
            if value is not None:
                raise ConfigError(f"{name} without run folders", why="what is measured is this machine", fix="Name run folders.")
        _measure(precision or ["fp32"], out)


def _measure(precisions: list[str], out: Path) -> None:
    from toolkit.calibrate import session
    from toolkit.cluster.environment import gpu_count

    for precision in precisions:
        if precision not in session.PRECISIONS:
            raise ConfigError(f"--precision {precision!r} is not measured", fix=f"Use {' or '.join(session.PRECISIONS)}.")
    if gpu_count():
        raise ConfigError(
            "toolkit calibrate without run folders measures CPUs",
            why="this machine has a GPU, which ranks would use",
            fix="Name run folders of toolkit profile, or set CUDA_VISIBLE_DEVICES= to nothing.",
        )
    if not out.resolve().parent.is_dir():
        raise ConfigError(f"--out {str(out)!r} cannot be written", why="its folder does not exist", fix="Name another file.")
    rates = session.measure(list(dict.fromkeys(precisions)), say=typer.echo)
    session.write(rates, out)
    typer.echo(f"{rates.processor}, {rates.cores} cores, {', '.join(precisions)}")
    typer.echo(f"written to {out}: use it with --hardware cpu:RANKS --calibration {out}")


def _fit(runs: list[Path], hardware: str | None, hardware_file: Path | None, out: Path) -> None:
    from toolkit.evidence import fit
    from toolkit.evidence import runs as own_runs

    measured = [own_runs.read_run(folder, hardware=hardware, hardware_file=hardware_file) for folder in dict.fromkeys(runs)]
    entries = own_runs.calibrate(measured)
    head = "# Written by `toolkit calibrate` from the runs named as sources: the share of the catalogue's matmul ceiling that they reach.\n"
    try:
        fit.write(entries, path=out, head=head)
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be written", why=error.strerror or str(error), fix="Name another file.") from None
    for entry in entries:
        typer.echo(f"{entry['gpu']} {entry['precision']}: scalar {entry['scale']:g} from {entry['steps']} steps of {entry['rows']} runs")
    for line in own_runs.remarks(entries):
        typer.echo(f"note: {line}")
    typer.echo(f"written to {out}: use it with --calibration {out}")
