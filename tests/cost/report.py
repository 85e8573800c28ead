"""docs/memory.md from what the suite last measured: `python -m tests.cost.report`."""

from __future__ import annotations

import json
from statistics import median

from tests.cost.test_own_engine_runs import BOUND, PARTS, RESULTS


def markdown() -> str:
    """The worst difference of every part, and of every cell."""
    found = json.loads(RESULTS.read_text())
    lines = [
        "# Predicted against measured memory of our own runs",
        "",
        "Written by `make parity`; do not edit. Each cell of the parity grid runs two steps on the CPU. In",
        "the second step every storage that the engine and autograd hold is counted on every rank. The count",
        "is compared with the figure of `toolkit estimate` for that rank. A cell shows its worst rank; the",
        f"suite fails beyond {BOUND:.1%} for any part, but for the kept inputs of chunks under full recompute and VPP.",
        "",
        "Three things are left out: NVMe offload, whose states live in files; `model.compile`; and hpZ under",
        "a pipeline. There the first stages hold a second partition of weights that are kept whole anyway,",
        "which is a third more than estimated.",
        "",
        f"{len(found)} cells, predicted over measured less one:",
        "",
        "| part | lowest | median | highest |",
        "|---|---:|---:|---:|",
    ]
    for part in PARTS:
        values = sorted(cell[part] for cell in found.values())
        lines.append(f"| {part} | {values[0]:+.2%} | {median(values):+.2%} | {values[-1]:+.2%} |")
    lines += [
        "",
        "Stages 2 and 3 hold DeepSpeed's reduce bucket of 5e8 elements. The peak also holds what comes and",
        "goes within single operations. That is only estimated: `toolkit profile` shows by how much the",
        "estimate of a run is off.",
        "",
        "| cell | ranks | " + " | ".join(PARTS) + " |",
        "|---|---:|" + "---:|" * len(PARTS),
    ]
    for name, cell in found.items():
        lines.append(f"| {name} | {cell['ranks']} | " + " | ".join(f"{cell[p]:+.2%}" for p in PARTS) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
