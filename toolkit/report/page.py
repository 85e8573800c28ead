"""One self-contained HTML page from runs: opens offline, asks for nothing, follows the reader's
light or dark scheme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from toolkit.report import expected, hosts, inference, memory, runs, times
from toolkit.report.headline import headline
from toolkit.report.svg import tag
from toolkit.runfolder.read import RunFolder

# nothing may be fetched: a page that tried would say so itself
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(folders: Sequence[RunFolder], *, title: str = "", bench: Mapping[str, Any] | None = None) -> str:
    """The whole report as HTML. bench: what toolkit bench-inference measured."""
    name = title or ", ".join(run.name for run in folders) or "Generating"
    heads = "".join((tag("h3", escape(run.name)) if len(folders) > 1 else "") + text for run in folders if (text := headline(run)))
    sections = [("overview", "Runs", heads + runs.side_by_side(folders) + _notes(folders))] if folders else []
    if any(run.metrics for run in folders):
        sections.append(("training", "Training", runs.curves(folders)))
    if told := expected.section(folders):
        sections.append(("expected", "Expected against measured", told))
    profiled = [run for run in folders if run.profile]
    for run in profiled:
        profile = run.profile
        assert profile is not None
        where = f" of {run.name}" if len(profiled) > 1 else ""
        body = _pair(
            ("By part, every rank", memory.by_part(profile)),
            ("During one step", memory.over_time(profile)),
        ) + _block("Predicted against measured", memory.against(profile))
        sections.append((f"memory-{run.name}", f"Memory{where}", body))
        body = _pair(("By part, every rank", times.breakdown(profile)), ("Predicted against measured", times.against(profile)))
        body += _block("Pipeline schedule", times.pipeline(profile)) + _block("Communication", times.traffic(profile))
        sections.append((f"time-{run.name}", f"Time of a step{where}", body))
    for run in folders:
        where = f" of {run.name}" if len(folders) > 1 else ""
        body = _block("Recoveries", hosts.recoveries(run.recoveries)) if run.recoveries else ""
        body += _block("Own work of the ranks, slowest first", hosts.own_work(run.ranks)) if run.ranks else ""
        if body:
            sections.append((f"hosts-{run.name}", f"Hosts{where}", body))
    for run in folders:
        if run.tune:
            sections.append(
                (f"tune-{run.name}", f"Plans of toolkit tune in {run.name}", tag("div", runs.ranking(run.tune), class_="block"))
            )
    if bench is not None:
        sections.append(("inference", "Generating", inference.section(bench)))
    links = "".join(tag("a", escape(head), href=f"#{_anchor(anchor)}") for anchor, head, _ in sections)
    main = "".join(tag("section", tag("h2", escape(head)) + body, id=_anchor(anchor)) for anchor, head, body in sections)
    style, script = (files("toolkit.report").joinpath(part).read_text(encoding="utf-8") for part in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)} – toolkit report</title><style>{style}</style></head><body>"
        f"<header><h1>{escape(name)}</h1><nav>{links}</nav></header><main>{main}</main>"
        f'<div id="tip" hidden></div><script>{script}</script></body></html>\n'
    )


def _anchor(name: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "-" for c in name)


def _block(head: str, body: str) -> str:
    return tag("div", tag("h3", escape(head)) + body, class_="block")


def _pair(*blocks: tuple[str, str]) -> str:
    return tag("div", "".join(_block(head, body) for head, body in blocks), class_="pair")


def _notes(folders: Sequence[RunFolder]) -> str:
    said = [f"{run.name}: {note}" for run in folders for note in run.notes]
    said += [
        f"{run.name}: no profile.json; toolkit profile writes one, with memory and time by part."
        for run in folders
        if not run.profile and run.metrics
    ]
    said += [f"{run.name}: no metrics.jsonl; toolkit train writes it." for run in folders if run.profile and not run.metrics]
    return tag("ul", "".join(tag("li", escape(note)) for note in said), class_="notes") if said else ""
