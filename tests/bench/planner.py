"""`make score-planner`: score predictions of published measurements, each source left out of every fit, into docs/planner.md.

Without the whole file of rows (it is not part of this repository) the sample in tests/evidence is scored, and no page written. The
sample's rows are of repositories with free licences, which each row names; its predictions are kept in golden.json for a test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tests.bench.planner_page import TARGETS, page
from tests.bench.planner_pictures import pictures
from toolkit.config.explain import validate
from toolkit.errors import ToolkitError
from toolkit.evidence import conform, fit, measures
from toolkit.evidence.evaluate import evaluate
from toolkit.evidence.published import predict

SAMPLE = Path("tests/evidence/sample.jsonl")
GOLDEN = SAMPLE.with_name("golden.json")
REHEARSALS = Path("build/rehearsal.json")


def golden(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Of each row tokens a second on a GPU, GiB allocated and on the device, and the probability to fit, with what is stored."""
    names = ("tokens_per_s_per_gpu", "peak_allocated_gib", "peak_reserved_gib", "p_fits")
    return {str(row["id"]): [answer[name] for name in names] for row in rows for answer in (predict(row),)}


def write_golden(rows: Sequence[Mapping[str, Any]]) -> None:
    """Store the sample's figures."""
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(figures)}" for name, figures in golden(rows).items())
    GOLDEN.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def main(
    measured: Annotated[Path, typer.Argument(help="JSONL of published rows")],
    out: Annotated[Path, typer.Option(help="where the page goes, its pictures beside it")] = Path("docs/planner.md"),
    sample: Annotated[Path, typer.Option(help="rows to score where MEASURED is not there")] = SAMPLE,
    refit: Annotated[bool, typer.Option("--fit", help="store the fitted constants, scalars and interval widths")] = False,
) -> None:
    """Score the planner's predictions, print the scores and write the page."""
    whole = measured.is_file()
    try:
        rows = fit.load_rows(measured if whole else sample)
        evaluation = evaluate(rows, rehearsals=REHEARSALS, validate=validate)
        scores = measures.measure(rows, evaluation.held_out)
    except ToolkitError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(error.exit_code) from None
    typer.echo(json.dumps({path[0]: scores[path[0]] for path, *_ in TARGETS}, indent=1, ensure_ascii=False))
    if not whole:
        typer.echo(f"{str(measured)!r} is not here: these are the scores of {sample}; {out} is left as it is.")
        return
    if refit:
        fit.write(evaluation.fit.entries)
        fit.write_constants(evaluation.fit.constants)
        conform.write(evaluation.widths, evaluation.comparison)
        typer.echo("stored; run again without --fit for a page and golden figures of what is stored")
        return
    write_golden(fit.load_rows(sample))
    drawn = pictures(rows, evaluation.held_out, scores)
    for name, text in drawn.items():
        (out.parent / name).write_text(text, encoding="utf-8")
    out.write_text(page(evaluation, pictures=list(drawn)), encoding="utf-8")
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
