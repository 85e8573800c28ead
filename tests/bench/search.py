"""`make bench-search`: how long the planner searches, on how many candidates and in how much memory, by the number of GPUs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from toolkit.config.load import parse_config
from toolkit.hardware.catalogue import parse_hardware
from toolkit.plan.tune import Question, tune

log = logging.getLogger("bench")

# (model, GPUs a node x nodes, sequences a step)
CASES = (
    ("llama3-405b", "8x2048", 2048),
    ("llama3-405b", "8x256", 2048),
    ("llama3-405b", "8x65536", 2048),
    ("llama3-405b", "8x2048", 1920),
    ("llama3-70b", "8x8", 512),
    ("llama3-8b", "8x1", 64),
)
ROUNDS = 3
# (verb, model, GPUs a node x nodes, sequences a step)
WHOLE = (("tune", "llama3-405b", "8x2048", 2048), ("tune", "llama3-8b", "8x1", 64), ("estimate", "llama3-8b", "8x1", 64))
WHOLE_ROUNDS = 5


def measure(model: str, size: str, batch: int) -> dict[str, Any]:
    """Search once in this process and then answer all of `toolkit tune`; seconds of clock and CPU, MiB of peak memory."""
    config = parse_config({"model": {"preset": model}, "train": {"global_batch_size": batch, "seq_length": 8192}})
    question = Question(config=config, hardware=parse_hardware(f"h100-80gb:{size}"))
    started, busy = time.perf_counter(), time.process_time()
    found = question.ask(top=10)
    searched = time.perf_counter() - started, time.process_time() - busy
    tune(question)
    best = found.plans[0].workload
    return {
        "search_s": searched[0],
        "search_cpu_s": searched[1],
        "tune_cpu_s": time.process_time() - busy - searched[1],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "candidates": found.candidates,
        "sized": found.sized,
        "timed": found.timed,
        "best": f"tp {best.tp} pp {best.pp} vpp {best.vpp} dp {best.dp} ZeRO-{best.zero}, recompute {best.recompute}",
    }


def fresh(model: str, size: str, batch: int) -> dict[str, Any]:
    """The fastest of ROUNDS measurements, each in a process whose caches are empty."""
    command = [sys.executable, "-m", "tests.bench.search", "--one", model, size, str(batch)]
    rounds = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(ROUNDS)]
    return min(rounds, key=lambda r: r["search_s"])


def table() -> str:
    """All cases as Markdown."""
    commands = whole()
    lines = [
        "| model | GPUs | sequences a step | candidates | sized | timed | search, s (clock) | s (CPU) | with what-ifs, s (CPU) | peak MiB | best |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for model, size, batch in CASES:
        r = fresh(model, size, batch)
        node, nodes = map(int, size.split("x"))
        lines.append(
            f"| {model} | {node * nodes:,} | {batch:,} | {r['candidates']:,} | {r['sized']:,} | {r['timed']:,} | {r['search_s']:.2f} "
            f"| {r['search_cpu_s']:.2f} | {r['tune_cpu_s']:.2f} | {r['peak_mib']:.0f} | {r['best']} |"
        )
        log.info(lines[-1])
    from tests.bench import overhead  # last: it imports torch, and a child's peak memory counts from its parent's

    lines += ["", "| whole command, with its what-ifs | wall, s | CPU, s | peak MiB |", "|---|---:|---:|---:|"]
    for name, (wall, cpu, peak) in commands.items():
        lines.append(f"| {name} | {wall:.2f} | {cpu:.2f} | {peak:.0f} |")
        log.info(lines[-1])
    note = (
        f"Searches: the fastest of {ROUNDS} fresh processes. Whole commands, from the interpreter's start to the answer: medians of "
        f"{WHOLE_ROUNDS} runs, one command after the other in turn."
    )
    return "\n".join([*lines, "", overhead.fill(note), "", overhead.machine(packages=False)])


def whole() -> dict[str, tuple[float, float, float]]:
    """Seconds (clock, CPU) and MiB of peak memory of whole commands, the interpreter's start included: medians, run in turn."""
    runs: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(WHOLE_ROUNDS):
            for verb, model, size, batch in WHOLE:
                config = Path(folder) / f"{model}.yaml"
                config.write_text(
                    f"model: {{preset: {model}}}\ntrain: {{global_batch_size: {batch}, seq_length: 8192}}\n", encoding="utf-8"
                )
                command = [sys.executable, "-m", "toolkit.cli", verb, str(config), "--hardware", f"h100-80gb:{size}"]
                started = time.perf_counter()
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
                _, status, used = os.wait4(process.pid, 0)
                wall = time.perf_counter() - started
                process.returncode = os.waitstatus_to_exitcode(status)
                assert process.returncode in (0, 1), command  # 1: the estimate says that it does not fit
                node, nodes = map(int, size.split("x"))
                name = f"`toolkit {verb}`, {model} on {node * nodes:,} GPUs"
                runs.setdefault(name, []).append((wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024))
    return {name: tuple(map(median, zip(*measured, strict=True))) for name, measured in runs.items()}  # type: ignore[misc]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and, with --write, keep."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.search", description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "SIZE", "BATCH"), help="one measurement in this process, as JSON")
    parser.add_argument("--write", type=Path, help="the Markdown file with the generated markers")
    asked = parser.parse_args(arguments)
    if asked.one:
        model, size, batch = asked.one
        sys.stdout.write(json.dumps(measure(model, size, int(batch))))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    block = table()
    if asked.write:
        from tests.bench import overhead

        overhead.write(asked.write, {"search": block})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
