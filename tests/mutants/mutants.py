"""The list of faults: `*.yaml` beside this file, each fault with the test that must turn red."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """A small fault: the text `before` of a file becomes `after`; test: what must notice, as pytest
    names it.
    """

    fault: str
    file: str
    before: str
    after: str
    test: str

    def applied(self, root: Path = ROOT) -> str:
        """The file's text with the fault in it; ValueError where `before` is not there exactly once."""
        text = (root / self.file).read_text()
        if (count := text.count(self.before)) != 1:
            raise ValueError(f"{self.file} has {count} times, not once, what '{self.fault}' changes: {self.before}")
        return text.replace(self.before, self.after)


def load() -> list[Mutant]:
    """All faults, file by file."""
    return [Mutant(**one) for path in sorted(Path(__file__).parent.glob("*.yaml")) for one in yaml.safe_load(path.read_text())]
