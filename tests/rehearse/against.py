"""Rehearsals beside the estimate of the same configurations, part by part.

python -m tests.rehearse.against [--only TEXT] [--most N] [--again] [--processes N] [--results
build/rehearsal.json]
python -m tests.rehearse.against --show tuned|held-out          compares again what was rehearsed before
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from tests.rehearse.grid import Point, grid
from toolkit.cost import memory, own_states
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
    return {**stage.parts, **own_states.on_device(w, p.stage, cpu=False), "peak": peak, "moment": stage.moment}  # type: ignore[dict-item]


def kept(p: Point, answer: dict[str, Any]) -> dict[str, Any]:
    """What is written down of a rehearsal: all that does not depend on the estimate."""
    if "error" in answer:
        return {"raw": p.raw, "error": answer["error"], "trace": answer.get("trace", "")}
    peak = answer["step"]["peak"]
    return {
        "raw": p.raw,
        "rehearsed": {**answer["parts"], "peak": answer["allocated"]},
        "host": answer["host"],
        "reserved": answer["peak_reserved"],
        "moment": [peak["phase"], peak["module"], peak["operator"], peak["place"]],
        "peak parts": peak["parts"],
        "seconds": answer["cpu_seconds"],
    }


def compare(p: Point, row: dict[str, Any]) -> dict[str, Any]:
    """A row of kept() with bytes estimated and the relative differences."""
    said, seen = estimated(p), row["rehearsed"]
    off = {part: 0.0 if abs(said[part] - seen[part]) <= SMALL else said[part] / max(1, seen[part]) - 1 for part in (*STATES, "peak")}
    return {**row, "name": p.name, "ranks": p.world, "held out": p.held_out, "off": off, "estimated": said}


def known(results: Path) -> dict[str, dict[str, Any]]:
    """Rows rehearsed before, by name; of configurations that are still as they were."""
    rows = json.loads(results.read_text()) if results.exists() else {}
    return {p.name: rows[p.name] for p in grid() if p.name in rows and rows[p.name].get("raw") == p.raw}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--most", type=int, default=None)
    parser.add_argument("--again", action="store_true", help="also those that are in the results already")
    parser.add_argument("--processes", type=int, default=None)
    parser.add_argument("--show", choices=("tuned", "held-out"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    before = known(options.results)
    points = [p for p in grid() if options.only in p.name]
    if options.show:
        for p in points:
            if p.name in before and p.held_out == (options.show == "held-out"):
                print(shown(p, before[p.name]))
        return
    points = [p for p in points if options.again or "rehearsed" not in before.get(p.name, {})]
    points.sort(
        key=lambda p: (p.held_out, p.config.model.hidden_size > 4096)
    )  # those that are looked at first, the cheap ones before the dear
    points = points[: options.most]
    started = time.perf_counter()

    def keep(number: int, answer: dict[str, Any]) -> None:
        p = points[number]
        before[p.name] = kept(p, answer)
        options.results.write_text(json.dumps(before, indent=1))
        print(f"{p.name}: {answer.get('seconds', 0):.0f} s" if p.held_out else shown(p, before[p.name]), flush=True)

    if points:
        run([job(p) for p in points], answered=keep, processes=options.processes)
    print(f"{len(points)} rehearsed in {time.perf_counter() - started:.0f} s")


def shown(p: Point, kept_row: dict[str, Any]) -> str:
    """One row for the terminal, with all parts where it differs."""
    if "error" in kept_row:
        return "\n   ".join(["ERROR", p.name, kept_row["error"][:200], *kept_row["trace"].strip().splitlines()[-6:]])
    row = compare(p, kept_row)
    off = {k: f"{v:+.1%}" for k, v in row["off"].items()}
    text = f"{p.name} {off} {row['rehearsed']['peak'] / 2**30:.2f} GiB {row['moment'][:3]} {row['seconds']:.0f} s"
    if any(abs(v) > 0.01 for v in row["off"].values()):
        for what in ("rehearsed", "peak parts", "estimated"):
            text += f"\n    {what}: { {k: round(v / 2**20, 1) for k, v in row[what].items() if k != 'moment'} }"
        text += f"\n    {row['estimated']['moment']}"
    return text


if __name__ == "__main__":
    main()
