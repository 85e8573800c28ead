"""docs/rehearsal.md: the text between the markers is written from build/rehearsal.json and the
estimate as it is now.

python -m tests.rehearse.report --write docs/rehearsal.md
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tests.rehearse.against import HARDWARE, RESULTS, STATES, compare, known
from tests.rehearse.grid import grid

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PEAK, PARTS = 0.02, 0.01


def within(row: dict[str, Any]) -> bool:
    """Whether the estimate of a row is as near as it should be."""
    return abs(row["off"]["peak"]) <= PEAK and all(abs(row["off"][p]) <= PARTS for p in STATES)


def why(name: str, phase: str) -> str:
    """What is known to be missing from the estimate of a row that is not within the bounds. phase:
    where its peak is.
    """
    if "ZeRO-3" in name and phase.startswith("forward"):
        return "how far DeepSpeed's prefetch of weights has come is followed by model chunk, not by module"
    if "ZeRO-3" in name:
        return "which weights are whole when DeepSpeed sends gradients is followed by layer, and not what it fetches ahead then"
    if "ZeRO-2" in name:
        return "what a recomputed layer still holds when DeepSpeed sends a bucket is bounded, not followed"
    return "not found yet"


def table(rows: list[dict[str, Any]], broken: list[str]) -> str:
    """The summary, what is not within the bounds and why, and one line for each configuration."""
    lines = [f"{len(rows)} configurations on {HARDWARE.split(':')[0]}, up to {max(r['ranks'] for r in rows):,} GPUs, no row longer than"]
    lines += [
        f"{max(r['seconds'] for r in rows):.0f} s of one core. Within {PEAK:.0%} on the peak and {PARTS:.0%} on each of parameters, gradients and"
    ]
    lines += ["optimizer states are:", ""]
    for name, held_out in (("mended with", False), ("held out", True)):
        part = [r for r in rows if r["held out"] == held_out]
        lines.append(
            f"- {name}: {sum(map(within, part))} of {len(part)}; the largest difference of a state is "
            f"{max(abs(r['off'][s]) for r in part for s in STATES):.2%}."
        )
    lines += ["", "Not within them:", "", "| Configuration | peak | where it is likely lost |", "|---|---:|---|"]
    ordered = sorted(rows, key=lambda r: (-abs(r["off"]["peak"]), r["name"]))
    lines += [
        f"| {r['name']}{', held out' if r['held out'] else ''} | {r['off']['peak']:+.1%} | {why(r['name'], r['moment'][0])} |"
        for r in ordered
        if not within(r)
    ]
    lines += [f"| {name} | | its rehearsal failed |" for name in broken]
    lines += ["", "All of them:", ""]
    lines += ["| Configuration | rehearsed GiB | estimate: peak | largest difference of a state | reserved GiB | host GiB | peak in |"]
    lines += ["|---|---:|---:|---:|---:|---:|---|"]
    for r in ordered:
        state = max((r["off"][p] for p in STATES), key=abs)
        phase, module = r["moment"][:2]
        where = f"{phase.split()[0]}, `{module}`" if module else phase
        host = f"{r['host']['peak'] / 2**30:.2f}" if r["host"]["peak"] > 2**24 else ""
        lines.append(
            f"| {r['name']} | {r['rehearsed']['peak'] / 2**30:.2f} | {r['off']['peak']:+.1%} | {state:+.2%} "
            f"| {r['reserved'] / 2**30:.2f} | {host} | {where} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path, required=True)
    options = parser.parse_args()
    found = known(RESULTS)
    rows = [compare(p, found[p.name]) for p in grid() if "rehearsed" in found.get(p.name, {})]
    broken = [name for name, row in found.items() if "error" in row]
    page = options.write.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    options.write.write_text(f"{before}{BEGIN}\n{table(rows, broken)}\n{END}{after}")


if __name__ == "__main__":
    main()
