"""Pipeline stages on unequal devices: tokens a second by the even cut and by the measured one, on SmolLM2-135M-Instruct.

`python -m tests.bench.stages --write docs/inference.md` puts the table between that page's markers. Two ranks have a core each, and the
second one's core is also given to busy processes. The two ways take turns in the same processes; each ratio is the
median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.cluster.launch import end_with_parent

PROMPTS = [f"A list of {n} words that begin with the letter {c}:" for n, c in zip(range(3, 11), "abcdefgh", strict=True)]
TOKENS = 16
PAIRS = 5
BUSY = 2
MANY = 4  # times the prompts


@contextmanager
def busy(processes: int, *, core: int) -> Iterator[None]:
    """So many processes that compute on one core."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=end_with_parent) for _ in range(processes)]
    try:
        for process in started:
            os.sched_setaffinity(process.pid, {core})
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def rank(path: Path) -> None:
    """One rank: measures both comparisons; rank 0 writes what it found beside the request."""
    import torch
    import torch.distributed as dist

    asked = json.loads(path.read_text())
    number = int(os.environ["RANK"])
    os.sched_setaffinity(0, {asked["cores"][number]})
    torch.set_num_threads(1)

    from toolkit.inference.generate import Generator
    from toolkit.inference.request import Request
    from toolkit.inference.run import Session

    micro_batches = Generator.in_flight

    def session(cut: str) -> Session:
        asks = {"prompts": PROMPTS, "max_new_tokens": TOKENS, "overrides": ["parallel.pp=2"], "dtype": "fp32"}
        made = Session(Request(model=asked["model"], layers_per_stage=cut, **asks))
        made.text.stop = frozenset()
        return made

    def one(by: Session, times: int = 1, *, alone: bool = False) -> dict[str, Any]:
        # one batch in flight is no option of the command: it is what generating was before micro-batches
        Generator.in_flight = property(lambda _self: 1) if alone else micro_batches  # type: ignore[assignment,method-assign]
        by.request = replace(by.request, batch=times * len(PROMPTS))
        ids = times * by.encode(PROMPTS)
        dist.barrier()
        started = time.perf_counter()
        answers = by.generate(ids)
        rate = len(ids) * TOKENS / (time.perf_counter() - started)
        return {"rate": rate, "layers": by.layers_per_stage, "tokens": answers and [a.tokens for a in answers]}

    even, measured = session("even"), session("measured")
    for by in (even, measured):
        one(by)  # warms up
    found: dict[str, list[Any]] = {
        "few": [(one(even, alone=True), one(even)) for _ in range(PAIRS)],
        "many": [(one(even, MANY, alone=True), one(even, MANY)) for _ in range(PAIRS)],
        "ends": [(one(even, MANY), one(measured, MANY)) for _ in range(PAIRS)],
    }
    measured.close()
    with busy(BUSY, core=asked["cores"][1]) if number == 0 else nullcontext():
        dist.barrier()
        measured = session("measured")
        one(measured)
        found["slow"] = [(one(even), one(measured)) for _ in range(PAIRS)]
    if number == 0:
        path.with_suffix(".found").write_text(json.dumps(found))


def row(what: str, pairs: list[Any]) -> str:
    before, after = (statistics.median(pair[i]["rate"] for pair in pairs) for i in (0, 1))
    ratio = statistics.median(two["rate"] / one["rate"] for one, two in pairs)
    cuts = [sorted({",".join(map(str, pair[i]["layers"])) for pair in pairs}) for i in (0, 1)]
    same = all(one["tokens"] == two["tokens"] for one, two in pairs)
    words = [" or ".join(c) for c in cuts]
    return f"| {what} | {before:.1f} ({words[0]}) | {after:.1f} ({words[1]}) | {ratio:.2f} | {'equal' if same else 'not equal'} |"


def measure() -> str:
    from tests.bench.inference import make
    from toolkit.cluster.launch import run_local

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("two cores are needed: a stage on each")
    with tempfile.TemporaryDirectory(prefix="bench-stages-") as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps({"model": str(make(Path(folder))["fp32"]), "cores": [cores[0], cores[-1]]}))
        code = run_local(path, num_procs=2, module="tests.bench.stages", environ=dict(os.environ))
        if code:
            sys.exit(code)
        found = json.loads(path.with_suffix(".found").read_text())
    few = len(PROMPTS)
    return "\n".join(
        [
            f"SmolLM2-135M-Instruct in fp32 on two ranks, {TOKENS} new tokens a prompt; {PAIRS} pairs by turns, medians.",
            "Before and after are the two ways that the row names, with the layers of each stage.",
            "",
            "| | tokens/s before | after | ratio | tokens |",
            "|---|---|---|---|---|",
            row(f"equal cores, {few} prompts: one batch in flight, two micro-batches", found["few"]),
            row(f"equal cores, {MANY * few} prompts: one batch in flight, two micro-batches", found["many"]),
            row(f"equal cores, {MANY * few} prompts: even cut, measured cut", found["ends"]),
            row(f"{BUSY} busy processes on the second stage's core, {few} prompts: even cut, measured cut", found["slow"]),
        ]
    )


def main() -> None:
    if "RANK" in os.environ:
        rank(Path(sys.argv[1]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="page to put the table into")
    arguments = parser.parse_args()
    block = measure()
    sys.stdout.write(block + "\n")
    if arguments.write:
        from tests.bench.overhead import write

        write(arguments.write, {"stages": block})


if __name__ == "__main__":
    main()
