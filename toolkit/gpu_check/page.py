"""The result as JSON and as a page: pure."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.files import write_durably

FORMAT = 1
WORDS = {"pass": "pass", "fail": "**FAIL**", "note": "", "skip": "skipped"}
COLUMNS = 100


def slug(device: str) -> str:
    """A device's name as part of a file's name: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write both files whole or not at all, and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"gpu-check-{slug(report['device'])}-{report['date']}"
    write_durably(folder / f"{stem}.json", json.dumps(report, indent=1) + "\n")
    path = folder / f"{stem}.md"
    write_durably(path, markdown(report))
    return path


def markdown(report: Mapping[str, Any]) -> str:
    """The page: the answer first, then each check with its rows."""
    checks: Sequence[Mapping[str, Any]] = report["checks"]
    failed = [c["name"] for c in checks if c["verdict"] == "fail"]
    waiting = [name for name in report["planned"] if name not in {c["name"] for c in checks}]
    if waiting:
        answer = f"Not finished: {', '.join(waiting)} had not run when this was written."
    elif failed:
        answer = f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}."
    else:
        answer = f"All {sum(c['verdict'] == 'pass' for c in checks)} checks that ran are as expected."
    lines = [
        f"# GPU check: {report['device']}, {report['date']}",
        "",
        *textwrap.wrap(("**Red.** " if failed or waiting else "**Green.** ") + answer, COLUMNS),
        "",
        *textwrap.wrap(
            f"Written by `{report['command']}` with toolkit {report['version']}, in {report['seconds'] / 60:.1f} of "
            f"{report['minutes']:g} minutes. docs/gpu-check.md says how to read it.",
            COLUMNS,
        ),
        "",
        "| check | | s | |",
        "|---|---|---:|---|",
    ]
    lines += [f"| {c['name']} | {WORDS[c['verdict']]} | {c['seconds']:.0f} | {_cell(_summary(c))} |" for c in checks]
    for check in checks:
        lines += ["", f"## {check['title']}", ""]
        if check["note"]:
            lines += [*textwrap.wrap(f"{check['state'].capitalize()}: {check['note']}", COLUMNS, break_long_words=False), ""]
        if check["rows"]:
            lines += ["| | | measured | expected | bound | |", "|---|---|---|---|---|---|", *map(_row, check["rows"]), ""]
        if check["trace"]:
            lines += ["```", check["trace"].replace("```", "'''").strip(), "```", ""]
        while lines[-1] == "":
            lines.pop()
    return "\n".join(lines) + "\n"


def _summary(check: Mapping[str, Any]) -> str:
    counts = {v: sum(row["verdict"] == v for row in check["rows"]) for v in ("pass", "fail", "skip")}
    words = [f"{counts['pass']} pass"] if counts["pass"] else []
    words += (
        [f"{counts['fail']} fail: {', '.join(row['name'] for row in check['rows'] if row['verdict'] == 'fail')}"] if counts["fail"] else []
    )
    words += [f"{counts['skip']} skipped"] if counts["skip"] else []
    return "; ".join([check["note"][:100]] * bool(check["note"]) + words)


def _row(row: Mapping[str, Any]) -> str:
    cells = (row["name"], WORDS[row["verdict"]], _figure(row["measured"]), _figure(row["expected"]), row["bound"], row["note"])
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
