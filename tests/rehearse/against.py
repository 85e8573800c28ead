"""Rehearsals beside the estimate of the same configurations, part by part.

python -m tests.rehearse.against [--only TEXT] [--most N] [--again] [--results build/rehearsal.json]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from tests.rehearse.grid import Point, grid
from toolkit.cost import memory
from toolkit.cost.workload import Workload
from toolkit.hardware.catalogue import parse_hardware
from toolkit.parallel.layout import Coordinates, Layout
from toolkit.rehearse.session import Job, run

STATES = ("parameters", "gradients", "optimizer")
SMALL = 4096  # bytes: flags and counters that no estimate names
RESULTS = Path("build/rehearsal.json")
HARDWARE = "h100-80gb:8x2048"


def job(p: Point) -> Job:
    """The rehearsal of a point: one rank of its stage."""
    rank = Layout.of(p.config, p.world).rank(Coordinates(tp=0, cp=0, dp=0, pp=p.stage))
    return Job(config=p.config, world=p.world, rank=rank, hardware=HARDWARE)


def estimated(p: Point) -> dict[str, float]:
    """The estimate's parts for the same rank; the peak is of tensors alone, as a rehearsal counts them."""
    w = Workload.of(p.config, p.world)
    stage = memory.estimate(w, parse_hardware(HARDWARE), only=p.stage).stages[0]
    peak = stage.allocated - stage.parts["communication"] - stage.parts["workspace"]
    return {**stage.parts, "peak": peak, "moment": stage.moment}  # type: ignore[dict-item]


def compare(p: Point, answer: dict[str, Any]) -> dict[str, Any]:
    """One row: bytes rehearsed and estimated, and the relative differences."""
    if "error" in answer:
        return {"name": p.name, "error": answer["error"], "trace": answer.get("trace", "")}
    said = estimated(p)
    seen = {**answer["parts"], "peak": answer["allocated"]}
    off = {part: 0.0 if abs(said[part] - seen[part]) <= SMALL else said[part] / max(1, seen[part]) - 1 for part in (*STATES, "peak")}
    peak = answer["step"]["peak"]
    return {
        "name": p.name,
        "ranks": p.world,
        "off": off,
        "rehearsed": seen,
        "estimated": said,
        "reserved": answer["peak_reserved"],
        "moment": [peak["phase"], peak["module"], peak["operator"], peak["place"]],
        "peak parts": peak["parts"],
        "seconds": answer["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--most", type=int, default=None)
    parser.add_argument("--again", action="store_true", help="also those that are in the results already")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    before = json.loads(options.results.read_text()) if options.results.exists() else {}
    points = [p for p in grid() if options.only in p.name and (options.again or p.name not in before)]
    random.Random(0).shuffle(points)  # a grid that is cut short has still seen everything
    points.sort(key=lambda p: p.config.model.hidden_size > 4096)
    points = points[: options.most]
    started = time.perf_counter()

    def keep(number: int, answer: dict[str, Any]) -> None:
        rows.append(compare(points[number], answer))
        before.update({rows[-1]["name"]: rows[-1]} if "error" not in rows[-1] else {})
        options.results.write_text(json.dumps(before, indent=1))
        print("".join(show(rows[-1])), flush=True)

    run([job(p) for p in points], answered=keep)
    print(f"{len(rows)} rehearsed in {time.perf_counter() - started:.0f} s")


def show(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    if "error" in row:
        return "\n   ".join(["ERROR", row["name"], row["error"][:200], *row["trace"].strip().splitlines()[-6:]])
    text = (
        f"{row['name']} { {k: f'{v:+.1%}' for k, v in row['off'].items()} } {row['rehearsed']['peak'] / 2**30:.2f} GiB {row['moment'][:3]}"
    )
    if any(abs(v) > 0.01 for v in row["off"].values()):
        for what in ("rehearsed", "peak parts", "estimated"):
            text += f"\n    {what}: { {k: round(v / 2**20, 1) for k, v in row[what].items() if k != 'moment'} }"
        text += f"\n    {row['estimated']['moment']}"
    return text


if __name__ == "__main__":
    main()
