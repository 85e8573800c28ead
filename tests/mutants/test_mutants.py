"""The list of faults does not rot: each still changes its file, in one place, to something that compiles, for a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mutants.mutants import ROOT, Mutant, load
from tests.mutants.run import BEGIN, END, Result, table

MUTANTS = load()


@pytest.mark.parametrize("mutant", [pytest.param(m, id=re.sub(r"[^\w.-]+", "-", f"{Path(m.file).stem}-{m.fault}")) for m in MUTANTS])
def test_it_can_be_applied(mutant: Mutant) -> None:
    broken = mutant.applied()
    assert broken != (ROOT / mutant.file).read_text()
    compile(broken, mutant.file, "exec")
    path, _, name = mutant.test.partition("::")
    text = (ROOT / path).read_text()
    assert f"def {name.partition('[')[0]}(" in text if name else "def test_" in text


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 60 and len({(m.file, m.before, m.after) for m in MUTANTS}) == len(MUTANTS)


def test_the_page_lists_every_fault() -> None:
    """docs/tests.md is made by `make mutants`; each fault is in it, and noticed."""
    page = (ROOT / "docs/tests.md").read_text().split(BEGIN)[1].split(END)[0]
    there = {line for line in page.splitlines() if line.startswith("| ")}
    for mutant in MUTANTS:
        rows = {table([Result(mutant, how, 0.0, "")]).splitlines()[-1] for how in ("killed", "hangs")}
        assert rows & there, f"run `make mutants`: {mutant.fault}"
