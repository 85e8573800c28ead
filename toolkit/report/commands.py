"""`toolkit report`: run folders to one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.errors import DataError


def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="run folders, folders that toolkit tune wrote, or tune.json files")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="the HTML file to write")] = Path("report.html"),
    as_json: Annotated[bool, typer.Option("--json", help="print what was expected of each run and what was measured, as JSON")] = False,
    inference: Annotated[Path | None, typer.Option(help="what toolkit bench-inference --json wrote: a section on generating")] = None,
) -> None:
    """Show runs, their profiles and rankings as one HTML file that opens offline."""
    import json

    from toolkit.files import write_durably
    from toolkit.report import expected
    from toolkit.report.inference import read_bench
    from toolkit.report.page import page
    from toolkit.runfolder.read import read_runs

    if not runs and inference is None:
        raise DataError("there is nothing to show", fix="Name a run folder, or --inference FILE.")
    folders = read_runs(runs) if runs else []
    text = page(folders, bench=read_bench(inference) if inference is not None else None)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(out, text)
    except OSError as error:
        raise DataError(f"{out} cannot be written", why=error.strerror or str(error), fix="Name another file with -o.") from None
    if as_json:
        typer.echo(json.dumps(expected.as_json(folders), indent=1))
        return
    typer.echo(f"wrote {out} ({len(text) / 1024:.0f} KiB)")
