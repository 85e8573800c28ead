"""The pages of commands and of Python names are those of the code."""

from __future__ import annotations

import toolkit
from tests.site.reference import COMMANDS, NAMES, commands, commands_markdown, names_markdown


def test_the_page_of_commands_is_current() -> None:
    assert COMMANDS.read_text(encoding="utf-8") == commands_markdown(), "run: python -m tests.site.reference"


def test_the_page_of_names_is_current() -> None:
    assert NAMES.read_text(encoding="utf-8") == names_markdown(), "run: python -m tests.site.reference"


def test_nothing_is_left_out() -> None:
    headings = {line[3:] for page in (COMMANDS, NAMES) for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("## ")}
    assert headings == {name for name, _ in commands()} | set(toolkit.__all__)
    assert {"toolkit train", "toolkit convert export", "Trainer"} <= headings
