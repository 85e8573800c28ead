"""The commands and examples of the pages for users, taken out of their Markdown, in order.

A fenced block of sh, yaml, json or python is an example. What tests do with it is said in a comment
just before it, which readers of the page do not see:

    <!-- not run: REASON -->      what it needs is not here: GPUs, several hosts, a network
    <!-- all cells -->            run by `make test-all` alone; otherwise a small thing stands for what it makes
    <!-- with: key=value … -->    what the tests add to `toolkit train`, so that it takes seconds
    <!-- fails: TEXT -->          it is refused, with exit code 2 and a message that has TEXT in it
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIRST_HOUR = ROOT / "docs/first-hour.md"
HOW_TO = sorted((ROOT / "docs/how-to").glob("*.md"))
PAGES = [FIRST_HOUR, *HOW_TO, *sorted((ROOT / "docs/from").glob("*.md")), ROOT / "examples/README.md"]
BLOCK = re.compile(r"(?:^<!--(?P<comment>.*?)-->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```", re.S | re.M)


@dataclass
class Block:
    """One fenced example. kind and said: the comment before it, "" where there is none."""

    page: Path
    line: int
    language: str
    text: str
    kind: str
    said: str

    @property
    def name(self) -> str:
        """Where it stands."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The shell commands of the block: a line each, with what a backslash or a here-document
        joins to it.
        """
        found: list[str] = []
        lines = iter(self.text.splitlines())
        for line in lines:
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            whole = line
            while whole.endswith("\\"):
                whole += "\n" + next(lines)
            if match := re.search(r"<<\s*'?(\w+)'?", whole):
                for more in lines:
                    whole += "\n" + more
                    if more == match[1]:
                        break
            found.append(whole)
        return found


def blocks(page: Path) -> list[Block]:
    """All examples of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        kind, _, said = (match["comment"] or "").strip().partition(":")
        line = text[: match.start("language")].count("\n") + 1
        found.append(Block(page, line, match["language"], match["text"], kind, said.strip()))
    return found
