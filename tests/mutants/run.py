"""Put each fault into a copy of the project and run the test that must notice: `python -m tests.mutants.run` (or `make mutants`).

Prints a table; `--write docs/tests.md` also puts it there. Exit code 1 where a fault survives. `--only WORD` runs the faults whose
description, file or test holds the word.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from tests.mutants.mutants import ROOT, Mutant, load

DEADLINE_S = 300.0
LEFT_OUT = (".git", ".venv*", "build", "runs", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", "*.egg-info")
BEGIN, END = "<!-- mutants: begin -->", "<!-- mutants: end -->"


@dataclass(frozen=True)
class Result:
    """What became of a fault. how: killed, hangs (killed by the deadline), survived, or error: the test could not even run."""

    mutant: Mutant
    how: str
    seconds: float
    output: str

    @property
    def killed(self) -> bool:
        return self.how in ("killed", "hangs")


def copy_project(to: Path) -> Path:
    """A copy to break; compiled extensions are shared, since they do not depend on it."""
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    (to / "build").mkdir()
    for extensions in (ROOT / "build").glob("extensions-*"):
        (to / "build" / extensions.name).symlink_to(extensions.resolve())
    return to


def pytest(copy: Path, test: str, *, deadline_s: float) -> tuple[int | None, str]:
    """Exit code (None: it did not end in time) and output of one test in a copy."""
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    process = subprocess.Popen(
        command, cwd=copy, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=deadline_s)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, "no end in time"
    finally:
        with contextlib.suppress(ProcessLookupError):  # workers outlive a test that was killed
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def try_mutant(mutant: Mutant, copy: Path) -> Result:
    """Break the copy, run the test, mend the copy."""
    path = copy / mutant.file
    whole = path.read_text()
    started = time.perf_counter()
    try:
        path.write_text(mutant.applied(copy))
        code, output = pytest(copy, mutant.test, deadline_s=DEADLINE_S)
    finally:
        path.write_text(whole)
    how = {None: "hangs", 0: "survived", 1: "killed"}.get(code, "error")
    if how == "killed" and "skipped" in output.splitlines()[-1] and "failed" not in output.splitlines()[-1]:
        how = "error"
    return Result(mutant, how, time.perf_counter() - started, output)


def run(mutants: Sequence[Mutant], *, jobs: int) -> list[Result]:
    """All mutants, each in one of `jobs` copies; the tests are first run on the copies as they are, where they must be green."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: Queue[Path] = Queue()
        for i in range(jobs):
            copies.put(copy_project(Path(folder) / str(i)))

        def sound(test: str) -> str:
            copy = copies.get()
            try:
                code, output = pytest(copy, test, deadline_s=2 * DEADLINE_S)
            finally:
                copies.put(copy)
            say(f"{'green' if code == 0 else 'RED'}  without a fault: {test}")
            return "" if code == 0 else f"{test} is red without any fault\n{output[-3000:]}"

        def broken(mutant: Mutant) -> Result:
            copy = copies.get()
            try:
                result = try_mutant(mutant, copy)
            finally:
                copies.put(copy)
            say(f"{result.how:<8}  {result.seconds:5.0f} s  {mutant.fault}  [{mutant.file}]")
            return result

        with ThreadPoolExecutor(jobs) as threads:
            if problems := [p for p in threads.map(sound, sorted({m.test for m in mutants})) if p]:
                raise SystemExit("\n\n".join(problems))
            return list(threads.map(broken, mutants))


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def table(results: Sequence[Result]) -> str:
    """The results in Markdown."""
    lines = ["| fault | file | test that turns red | result |", "|---|---|---|---|"]
    for r in results:
        m = r.mutant
        lines.append(f"| {m.fault} | `{m.file}` | `{m.test.removeprefix('tests/')}` | {r.how} |")
    killed = sum(r.killed for r in results)
    return f"{killed} of {len(results)} faults are noticed.\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="copies that are tried at a time")
    parser.add_argument("--only", default="", help="word that the fault, file or test must hold")
    parser.add_argument("--write", type=Path, help="page to put the table into, between its marks")
    options = parser.parse_args()
    chosen = [m for m in load() if options.only in f"{m.fault} {m.file} {m.test}"]
    results = run(chosen, jobs=options.jobs)
    for r in results:
        if not r.killed:
            say(f"\n--- {r.how}: {r.mutant.fault} ({r.mutant.test})\n{r.output[-2000:]}")
    text = table(results)
    print(text)
    if options.write:
        page = options.write.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        options.write.write_text(f"{before}{BEGIN}\n{text}{END}{after}")
    return 0 if all(r.killed for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
