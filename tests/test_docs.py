"""The pages are made to be read: prose wraps, and links lead to something."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(p.relative_to(ROOT) for p in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")])
COLUMNS = 100


def prose(text: str) -> list[tuple[int, str]]:
    """Lines with their numbers, without those of code blocks, tables, comments and headings."""
    lines, code = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and not line.lstrip().startswith(("|", "#", "<!--", "![")):
            lines.append((number, line))
    return lines


def too_long(text: str) -> list[tuple[int, str]]:
    """Lines of prose over 100 columns; one long word, such as a link, cannot be wrapped."""
    return [(number, line) for number, line in prose(text) if len(line) > COLUMNS and len(line.split()) > 2]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_prose_wraps_at_100_columns(page: Path) -> None:
    assert too_long((ROOT / page).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
    assert [t for t in targets if not (ROOT / page.parent / t).exists()] == []


def test_facts_that_the_code_cites_are_in_the_list() -> None:
    listed = [int(n) for n in re.findall(r"^(\d+)\. ", (ROOT / "docs/design.md").read_text(encoding="utf-8"), re.M)]
    assert listed == list(range(1, len(listed) + 1)), "a list with gaps is numbered anew when it is shown"
    cited: set[int] = set()
    for path in (ROOT / "toolkit").rglob("*.py"):
        for first, last in re.findall(r"\bfacts? (\d+)(?:[-–](\d+))?", path.read_text(encoding="utf-8"), re.I):
            cited |= set(range(int(first), int(last or first) + 1))
    assert cited and cited <= set(listed)


def test_what_counts_as_prose() -> None:
    long = "word " * 30
    assert too_long(f"{long}\n") == [(1, long)]
    assert too_long(f"```\n{long}\n```\n| {long} |\n# {long}\n- https://{'x' * 120}\n") == []
    assert too_long(f"```\n```\n- {long}\n") == [(3, f"- {long}")]
