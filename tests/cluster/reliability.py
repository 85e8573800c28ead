"""docs/reliability.md from real runs:
`python -m tests.cluster.reliability [FAULT…] --write docs/reliability.md`.

Each fault strikes a run over three hosts, and what came of it is a row. Rows of faults that are not
named stay as they are.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.elastic import Elastic, Taken, uncut, write_config
from tests.cluster.faults import FAULTS, Fault
from tests.cluster.two_hosts import MORE_ADDRESSES, TwoHosts, missing, two_hosts

STEPS = 80
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
HEAD = "| fault | what the user sees | exit code | detect, s | recover, s | of it start, s | steps lost |\n|---|---|---|---|---|---|---|\n"


def outlive(
    fault: Fault, hosts: TwoHosts, config: Path, expected: Mapping[int, Taken], *, lost_after_s: float, words: tuple[str, ...] = ()
) -> str:
    """Let a fault strike a run, hold the run to what the fault's data say, and return its row;
    words: more options of the run.
    """
    undo = fault.before(hosts) if fault.before else None
    try:
        run = Elastic(hosts, config, fault.id, "--min-nodes", "1", *fault.words, *words, lost_after_s=lost_after_s)
        fault.strike(run)
        code = run.finish()
    finally:
        if undo is not None:
            undo()
    assert code == fault.code, f"exit code {code}\n{run.output}"
    said = re.search(rf".*(?:{fault.says}).*", run.output)
    assert said, f"{fault.says!r} is not in\n{run.output}"
    assert "Traceback" not in run.output.split("going on from")[0] or fault.recoveries, run.output
    if fault.code == 0:
        run.assert_equal(expected)
    assert len(run.recoveries) >= fault.recoveries, f"{run.recoveries}\n{run.output}"
    lost = max((r.steps_lost for r in run.recoveries), default=0)
    assert lost <= fault.lost_steps, f"{run.recoveries}\n{run.output}"
    return _row(fault, said[0].strip(), code, run)


def _row(fault: Fault, said: str, code: int, run: Elastic) -> str:
    worst = max(run.recoveries, key=lambda r: sum(r.seconds.values()), default=None)
    seconds = worst.seconds if worst else {}
    rest = sum(seconds.get(phase, 0.0) for phase in ("tear down", "plan", "start", "load", "first step"))
    # nobody saw when a supervisor died
    figures = (
        [f"{seconds['detect']:.1f}" if "detect" in seconds else "", f"{rest:.1f}", f"{seconds.get('start', 0.0):.1f}"]
        if worst
        else ["", "", ""]
    )
    lost = max((r.steps_lost for r in run.recoveries), default=0)
    said = said.replace(str(run.config.parent), "…").replace("|", "/")
    return f"| {fault.title} | `{said}` | {code} | {' | '.join(figures)} | {lost} |"


def main() -> int:
    """Run the faults that are named, or all."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("faults", nargs="*", default=[fault.id for fault in FAULTS])
    parser.add_argument("--write", type=Path, required=True)
    args = parser.parse_args()
    if reason := missing():
        sys.stderr.write(f"{reason}\n")
        return 2
    failed = 0
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        config = write_config(Path(folder), steps=STEPS)
        expected = uncut(config)
        for fault in (f for f in FAULTS if f.id in args.faults):
            (Path(folder) / f"hosts-{fault.id}").mkdir()
            try:
                with two_hosts(Path(folder) / f"hosts-{fault.id}", MORE_ADDRESSES) as hosts:
                    row = outlive(fault, hosts, config, expected, lost_after_s=5)
            except Exception as error:  # the others are worth a row each
                failed += 1
                sys.stderr.write(f"{fault.id} failed: {error}\n")
                continue
            write(args.write, fault.title, row)
            sys.stdout.write(row + "\n")
    return 1 if failed else 0


def write(page: Path, title: str, row: str) -> None:
    """Put a fault's row into the page, in the order of the data."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}
    rows.pop("fault", None)
    rows[title] = row
    ordered = [rows[fault.title] for fault in FAULTS if fault.title in rows]
    lines = "\n".join(ordered)
    page.write_text(f"{before}{BEGIN}\n{HEAD}{lines}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
