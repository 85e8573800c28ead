"""docs/parity.md from the last run of the suite: `python -m tests.parity.report`."""

from __future__ import annotations

import json

from tests.parity.cells import BOUNDS, STEPS
from tests.parity.test_parity import RESULTS


def markdown() -> str:
    """The table of worst differences, one row per cell."""
    result = json.loads(RESULTS.read_text())
    found = result["cells"]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines = [
        "# Parity",
        "",
        f"Each layout is compared with the single-process ZeRO-0 run of the same config over {STEPS} optimizer",
        "steps. The tables show the worst relative difference of the loss and of the global gradient norm",
        "before clipping. After the last step every value that several ranks hold (TP replicas, tied copies,",
        "data-parallel replicas) has the same bits on all of them, or the suite fails.",
        "",
        f"{len(found)} cells, CPU with gloo, made by `make parity`.",
        f"Versions: {versions}.",
        "",
        "| precision | cells | bound: loss, norm | worst loss | worst norm |",
        "|---|---|---|---|---|",
    ]
    for precision, (loss, norm) in BOUNDS.items():
        cells = [c for c in found.values() if c["precision"] == precision]
        if cells:
            worst = max(c["loss"] for c in cells), max(c["norm"] for c in cells)
            lines.append(f"| {precision} | {len(cells)} | {loss:.0e}, {norm:.0e} | {worst[0]:.1e} | {worst[1]:.1e} |")
    lines += ["", "| cell | ranks | loss | norm |", "|---|---|---|---|"]
    lines += [f"| {name} | {c['ranks']} | {c['loss']:.1e} | {c['norm']:.1e} |" for name, c in found.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
