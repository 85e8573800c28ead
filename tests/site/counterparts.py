"""The tables of docs/from/: each flag of another project, and what stands for it here.

python -m tests.site.counterparts writes them into the pages, between two comments. They are kept as
data, flags/*.yaml: groups of flags, and for each flag one of

    key       a key of the YAML, or section.key=value; also: a second one
    json      a key of a DeepSpeed JSON, which zero.config names
    cli       a command of the toolkit, or an option of it
    api       a name of the Python API
    unneeded  why nothing needs to be set
    absent    why or what not: there is no counterpart

and a note. tests/site/test_counterparts.py holds every name in them to the schema, DeepSpeed's
table, the parser and the API.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from toolkit.files import write_durably

ROOT = Path(__file__).parents[2]
TABLES = sorted(Path(__file__).with_name("flags").glob("*.yaml"))
KINDS = ("key", "json", "cli", "api", "unneeded", "absent")
BEGIN, END = "<!-- generated: flags -->", "<!-- end: flags -->"


class Flag(NamedTuple):
    """One flag of another project. kind: one of KINDS; what: the counterpart, or the reason that
    there is none.
    """

    name: str
    kind: str
    what: str
    also: str
    note: str


class Table(NamedTuple):
    """What one page shows. flags_of: the project and its version."""

    page: Path
    flags_of: str
    groups: dict[str, list[Flag]]

    @property
    def flags(self) -> list[Flag]:
        """Those of all groups."""
        return [flag for group in self.groups.values() for flag in group]


def read_table(path: Path) -> Table:
    """One file of flags/."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    groups = {title: [_flag(str(name), fields) for name, fields in flags.items()] for title, flags in raw["groups"].items()}
    return Table(ROOT / raw["page"], raw["flags_of"], groups)


def _flag(name: str, fields: dict[str, Any]) -> Flag:
    (kind,) = [k for k in KINDS if k in fields]
    surplus = fields.keys() - {kind, "also", "note"}
    if surplus:
        raise ValueError(f"{name}: {sorted(surplus)} are no fields")
    return Flag(name, kind, fields[kind], fields.get("also", ""), fields.get("note", ""))


def counterparts_markdown(table: Table) -> str:
    """What stands between the two comments of a page."""
    count = {kind: sum(flag.kind == kind for flag in table.flags) for kind in KINDS}
    there = len(table.flags) - count["unneeded"] - count["absent"]
    lines = [
        f"Flags of {table.flags_of}.",
        f"Of {len(table.flags)} flags {there} have a counterpart, {count['unneeded']} are not needed, and {count['absent']} have none.",
    ]
    for title, flags in table.groups.items():
        lines += ["", f"### {title}", "", "| There | Here | Remark |", "|---|---|---|"]
        lines += [f"| `{flag.name}` | {_here(flag)} | {_escaped(_remark(flag))} |" for flag in flags]
    return "\n".join(_wrapped(lines))


def _here(flag: Flag) -> str:
    if flag.kind == "key":
        section = flag.what.partition(".")[0]
        also = f", `{flag.also}`" if flag.also else ""
        return f"[`{flag.what}`](../configuration.md#{section}){also}"
    return {
        "json": f"[`{flag.what}`](../deepspeed.md) in a DeepSpeed JSON",
        "cli": f"[`{flag.what}`](../cli.md)",
        "api": f"[`{flag.what}`](../api.md)",
        "unneeded": "not needed",
        "absent": "**not there**",
    }[flag.kind]


def _remark(flag: Flag) -> str:
    return flag.what if flag.kind in ("unneeded", "absent") else flag.note


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _wrapped(lines: list[str]) -> list[str]:
    """Sentences ahead of the first table on lines of their own, wrapped at 100 columns."""
    import textwrap

    start = lines.index("")
    return [*textwrap.wrap(" ".join(lines[:start]), 100, break_on_hyphens=False), *lines[start:]]


def with_table(page: str, table: Table) -> str:
    """A page's text with its table as the data has it now."""
    inner = f"{BEGIN}\n{counterparts_markdown(table)}\n{END}"
    new, found = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: inner, page, flags=re.S)
    if found != 1:
        raise ValueError(f"the page has {found} places for its table: one is needed, {BEGIN} … {END}")
    return new


def main() -> None:
    """Write every table into its page."""
    for path in TABLES:
        table = read_table(path)
        write_durably(table.page, with_table(table.page.read_text(encoding="utf-8"), table).encode())


if __name__ == "__main__":
    main()
