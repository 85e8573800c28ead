"""The pictures of docs/long-context.md are those of the program as it is."""

from __future__ import annotations

from pathlib import Path

from tests.bench.long_context_pictures import pictures

DOCS = Path(__file__).parents[2] / "docs"


def test_pictures_are_up_to_date() -> None:
    for name, svg in pictures().items():
        assert (DOCS / name).read_text() == svg, "make bench-long-context"
        assert f"({name})" in (DOCS / "long-context.md").read_text()
