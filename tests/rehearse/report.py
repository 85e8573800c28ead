"""docs/rehearsal.md: the text between the markers is written from build/rehearsal.json.

python -m tests.rehearse.report --write docs/rehearsal.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tests.rehearse.against import HARDWARE, RESULTS, STATES

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PEAK, PARTS = 0.02, 0.01


def table(rows: list[dict[str, Any]]) -> str:
    """The summary and one line for each configuration."""
    within = [r for r in rows if abs(r["off"]["peak"]) <= PEAK and all(abs(r["off"][p]) <= PARTS for p in STATES)]
    lines = [
        f"{len(rows)} configurations on {HARDWARE.split(':')[0]}, up to {max(r['ranks'] for r in rows):,} GPUs;\n"
        f"{len(within)} within {PEAK:.0%} on the peak and\n{PARTS:.0%} on each of parameters, gradients and optimizer states.",
        "",
        "| Configuration | rehearsed GiB | estimate: peak | largest difference of a state | reserved GiB | peak in |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for r in sorted(rows, key=lambda r: (-abs(r["off"]["peak"]), r["name"])):
        state = max((r["off"][p] for p in STATES), key=abs)
        phase, module = r["moment"][:2]
        where = f"{phase.split()[0]}, `{module}`" if module else phase
        lines.append(
            f"| {r['name']} | {r['rehearsed']['peak'] / 2**30:.2f} | {r['off']['peak']:+.1%} | {state:+.2%} "
            f"| {r['reserved'] / 2**30:.2f} | {where} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path, required=True)
    options = parser.parse_args()
    rows = list(json.loads(RESULTS.read_text()).values())
    page = options.write.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    options.write.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


if __name__ == "__main__":
    main()
