"""The list of faults does not rot: each still changes its file, in one place, to something that
compiles, for a test that exists.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mutants.mutants import ROOT, Mutant, load
from tests.mutants.run import BEGIN, END, Result, table
from tests.site.warm import run_python

MUTANTS = load()


@pytest.mark.parametrize("mutant", [pytest.param(m, id=re.sub(r"[^\w.-]+", "-", f"{Path(m.file).stem}-{m.fault}")) for m in MUTANTS])
def test_it_can_be_applied(mutant: Mutant) -> None:
    broken = mutant.applied()
    assert broken != (ROOT / mutant.file).read_text()
    compile(broken, mutant.file, "exec")
    path, _, name = mutant.test.partition("::")
    text = (ROOT / path).read_text()
    assert f"def {name.partition('[')[0]}(" in text if name else "def test_" in text


COLLECT = """
import pytest, sys

class Names:
    def pytest_collection_finish(self, session):
        sys.stdout.write("".join(f"selected {item.nodeid}\\n" for item in session.items))

sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *FILES], plugins=[Names()]))
"""


def test_every_named_test_is_one_of_make_test() -> None:
    """Without --all-cells pytest selects it: a test that was renamed, or left to `make test-all`,
    notices nothing.
    """
    files = sorted({m.test.partition("::")[0] for m in MUTANTS})
    done = run_python(f"FILES = {files}\n{COLLECT}", ROOT, timeout_s=600.0)
    assert done.code == 0, done.output
    selected = {line.removeprefix("selected ") for line in done.output.splitlines() if line.startswith("selected ")}
    selected |= {name.partition("[")[0] for name in selected} | {name.partition("::")[0] for name in selected}
    assert {m.test for m in MUTANTS} - selected == set()


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 60 and len({(m.file, m.before, m.after) for m in MUTANTS}) == len(MUTANTS)


def test_the_page_lists_every_fault() -> None:
    """docs/tests.md is made by `make mutants`; each fault is in it, and noticed."""
    page = (ROOT / "docs/tests.md").read_text().split(BEGIN)[1].split(END)[0]
    there = {line for line in page.splitlines() if line.startswith("| ")}
    for mutant in MUTANTS:
        rows = {table([Result(mutant, how, 0.0, "")]).splitlines()[-1] for how in ("killed", "hangs")}
        assert rows & there, f"run `make mutants`: {mutant.fault}"
