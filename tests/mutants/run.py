"""Put each fault into a copy of the project and run the test that must notice:
`python -m tests.mutants.run` (or `make mutants`).

Prints a table; `--write docs/tests.md` also puts it there. Exit code 1 where a fault survives.
`--only WORD` runs the faults whose description, file or test holds the word.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from tests.mutants.mutants import ROOT, Mutant, load

DEADLINE_S = 300.0
LEFT_OUT = (".git", ".venv*", "build", "runs", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", "*.egg-info")
# imported once, before a test's process is forked; nothing of the project is among them
LIBRARIES = ("torch", "deepspeed", "megatron.core.models.gpt.gpt_layer_specs", "megatron.core.pipeline_parallel", "megatron.core.datasets.gpt_dataset", "transformers", "datasets", "hypothesis", "pydantic", "typer", "pytest")  # fmt: skip
BEGIN, END = "<!-- mutants: begin -->", "<!-- mutants: end -->"


@dataclass(frozen=True)
class Result:
    """What became of a fault. how: killed, hangs (killed by the deadline), survived, or error: the
    test could not even run.
    """

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


@dataclass(frozen=True)
class Started:
    """A test that runs in a process of its own, a copy's folder its working folder."""

    pid: int
    pidfd: int
    copy: Path
    log: Path
    started: float
    ends_at: float
    finish: Callable[[int | None, str, float], None]


def start_test(copy: Path, test: str, finish: Callable[[int | None, str, float], None], *, deadline_s: float) -> Started:
    """Fork a process that runs one test in a copy. finish: gets its exit code (None: no end in
    time), output and seconds.
    """
    log = copy.with_suffix(".log")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            os._exit(_run_pytest(copy, test))
        finally:
            os._exit(70)
    now = time.monotonic()
    return Started(pid, os.pidfd_open(pid), copy, log, now, now + deadline_s, finish)


def _run_pytest(copy: Path, test: str) -> int:
    """In the forked process: forget this project, and find the copy under its names."""
    for name in [n for n in sys.modules if n.partition(".")[0] in ("tests", "toolkit")]:
        del sys.modules[name]
    sys.modules["__main__"] = ModuleType("__main__")  # servers that tests start would import this file again
    os.chdir(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    os.environ |= {"PYTHONPATH": str(copy), "TESTS_POOL_START": "fork"}
    import pytest

    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", test]))
    sys.stdout.flush()
    return code


def end_test(running: Started) -> None:
    """Kill a test and the workers that outlive it, and hand on what came of it."""
    over = bool(select.select([running.pidfd], [], [], 0)[0])
    if not over:
        os.killpg(running.pid, signal.SIGKILL)
    _, status = os.waitpid(running.pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    os.close(running.pidfd)
    code = os.waitstatus_to_exitcode(status) if over else None
    running.finish(code, running.log.read_text(errors="replace"), time.monotonic() - running.started)


def in_turn(tasks: Iterator[Callable[[Path], Started]], copies: Sequence[Path]) -> None:
    """Run all tasks, one in each copy at a time."""
    free, running = list(copies), []
    while True:
        while free and (task := next(tasks, None)):
            running.append(task(free.pop()))
        if not running:
            return
        timeout = max(0.0, min(r.ends_at for r in running) - time.monotonic())
        ready = select.select([r.pidfd for r in running], [], [], timeout)[0]
        for one in [r for r in running if r.pidfd in ready or r.ends_at <= time.monotonic()]:
            running.remove(one)
            end_test(one)
            free.append(one.copy)


def run(mutants: Sequence[Mutant], *, jobs: int) -> list[Result]:
    """All mutants, each in one of `jobs` copies; the tests are first run on the copies as they are,
    where they must be green.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core laments optional packages
        for name in LIBRARIES:
            importlib.import_module(name)
    results: list[Result] = []
    red: list[str] = []

    def sound(test: str, copy: Path) -> Started:
        def finish(code: int | None, output: str, seconds: float) -> None:
            say(f"{'green' if code == 0 else 'RED':<8}  {seconds:5.0f} s  without a fault: {test}")
            if code != 0:
                red.append(f"{test} is red without any fault\n{output[-3000:]}")

        return start_test(copy, test, finish, deadline_s=2 * DEADLINE_S)

    def broken(mutant: Mutant, copy: Path) -> Started:
        path = copy / mutant.file
        whole = path.read_text()
        path.write_text(mutant.applied(copy))

        def finish(code: int | None, output: str, seconds: float) -> None:
            path.write_text(whole)
            how = {None: "hangs", 0: "survived", 1: "killed"}.get(code, "error")
            if how == "killed" and "FAILED " not in output:
                how = "error"  # of a fixture: the test itself has not looked
            say(f"{how:<8}  {seconds:5.0f} s  {mutant.fault}  [{mutant.file}]")
            results.append(Result(mutant, how, seconds, output))

        return start_test(copy, mutant.test, finish, deadline_s=DEADLINE_S)

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [copy_project(Path(folder) / str(i)) for i in range(jobs)]
        in_turn((partial(sound, test) for test in sorted({m.test for m in mutants})), copies)
        if red:
            raise SystemExit("\n\n".join(red))
        in_turn((partial(broken, mutant) for mutant in mutants), copies)
    return sorted(results, key=lambda r: mutants.index(r.mutant))


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
