"""`toolkit calibrate` on the command line; what fits is loaded when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.errors import ConfigError


def calibrate(
    runs: Annotated[list[Path], typer.Argument(help="run folders of toolkit profile or toolkit train")],
    hardware: Annotated[str | None, typer.Option(help="GPU:PER_NODExNODES they ran on; default: what the run folder records")] = None,
    hardware_file: Annotated[Path | None, typer.Option(help="YAML with more GPUs")] = None,
    out: Annotated[Path, typer.Option(help="YAML that estimate and tune take as --calibration")] = Path("calibration.yaml"),
) -> None:
    """Fit the planner's one scalar per GPU and precision to your own runs."""
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
