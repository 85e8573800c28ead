"""`make bench`: the step time of `toolkit train` over a bare megatron-core loop and over Hugging Face Trainer + DeepSpeed.

The loops live in processes of their own and take turns, so that whatever else the machine does
hits all of them alike; a round is one turn of each, and what counts is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import startup
from tests.bench.loops import Shape
from tests.bench.workers import Turn, Worker, versions

log = logging.getLogger("bench")

NAMES = {
    "bare": "megatron-core, bare: the toolkit's layers, torch's fused AdamW, no DeepSpeed",
    "megatron": "megatron-core, bare, with its own local layer spec (unfused attention)",
    "toolkit-zero1": "**toolkit, ZeRO-1**",
    "hf-zero1": "Hugging Face Trainer + DeepSpeed ZeRO-1",
    "toolkit-zero2": "toolkit, ZeRO-2",
    "hf-zero2": "Hugging Face Trainer + DeepSpeed ZeRO-2",
    "toolkit-zero3": "toolkit, ZeRO-3",
    "hf-zero3": "Hugging Face Trainer + DeepSpeed ZeRO-3",
}
BEGIN, END = "<!-- generated: {} -->", "<!-- end: {} -->"
TINY = Shape(num_layers=2, hidden_size=64, heads=4, ffn=128, vocab=256, seq_length=32)


@dataclass(frozen=True)
class Figure:
    """One loop's summary: median seconds a step, and the median and quartiles of its ratio to the first loop, by clock and CPU time."""

    kind: str
    wall_s: float
    cpu_s: float
    wall_ratio: tuple[float, float, float]
    cpu_ratio: tuple[float, float, float]
    losses: list[float]


def measure(kinds: Sequence[str], shape: Shape, *, rounds: int, steps: int, threads: int) -> list[Figure]:
    """Let the loops take turns; a turn is one untimed step (its memory may have grown cold) and `steps` timed ones."""
    workers: list[Worker] = []
    turns: dict[str, list[Turn]] = {kind: [] for kind in kinds}
    try:
        for kind in kinds:
            log.info("starting %s", kind)
            workers.append(Worker(kind, shape, threads=threads))
            turns[kind].append(workers[-1].turn(2))  # never counted: allocations, caches
        for number in range(rounds):
            for worker in workers if number % 2 else reversed(workers):
                turns[worker.kind].append(worker.turn(1 + steps))
            log.info("round %d of %d: %s", number + 1, rounds, ", ".join(f"{k} {_wall(turns[k][-1]):.2f} s" for k in kinds))
    finally:
        for worker in workers:
            worker.close()
    base = turns[kinds[0]][1:]
    figures = []
    for kind in kinds:
        timed = turns[kind][1:]
        figures.append(
            Figure(
                kind=kind,
                wall_s=statistics.median(map(_wall, timed)),
                cpu_s=statistics.median(map(_cpu, timed)),
                wall_ratio=_spread([_wall(t) / _wall(b) for t, b in zip(timed, base, strict=True)]),
                cpu_ratio=_spread([_cpu(t) / _cpu(b) for t, b in zip(timed, base, strict=True)]),
                losses=[loss for turn in turns[kind] for loss in turn.losses],
            )
        )
    return figures


def _wall(turn: Turn) -> float:
    return statistics.fmean(turn.wall_s[1:])


def _cpu(turn: Turn) -> float:
    return statistics.fmean(turn.cpu_s[1:])


def _spread(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def table(figures: list[Figure], shape: Shape, *, rounds: int, steps: int, threads: int) -> str:
    """The figures as a Markdown table with all that is needed to read them."""
    lines = [
        fill(
            f"Llama of {shape.num_layers} layers x {shape.hidden_size} (MLP {shape.ffn}, {shape.heads} heads, {shape.vocab} ids), fp32, SDPA, "
            f"{shape.micro_batches} micro-batches of {shape.micro_batch_size} sequences of {shape.seq_length} tokens a step; "
            f"1 process, {threads} threads; gradient norm clipped at {shape.clip:g}; {rounds} rounds of {steps} timed steps a turn."
        ),
        "",
        "| Loop | s/step (clock) | s/step (CPU) | over bare: clock, median [quartiles] | over bare: CPU time |",
        "|---|---|---|---|---|",
    ]
    for f in figures:
        ratios = " | ".join(f"{m:.3f} [{low:.3f}, {high:.3f}]" for m, low, high in (f.wall_ratio, f.cpu_ratio))
        lines.append(f"| {NAMES[f.kind]} | {f.wall_s:.2f} | {f.cpu_s:.2f} | {ratios} |")
    return "\n".join(lines)


def machine(*, packages: bool = True) -> str:
    """Versions (of the training libraries only if asked for) and processor, as a paragraph."""
    import psutil

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), model)
    names = "".join(f", {name} {version}" for name, version in versions().items()) if packages else ""
    load = psutil.getloadavg()[1]
    return fill(
        f"Python {platform.python_version()}{names}; {psutil.cpu_count()} cores ({model}); load average over the last 5 minutes {load:.1f}."
    )


def fill(text: str) -> str:
    """Wrap a paragraph of a page at 100 columns."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def start_up(*, num_procs: int = 2) -> str:
    """The quickstart's way to its first step, as Markdown."""
    config = startup.ROOT / "launch" / "recipes" / "quickstart.yaml"
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        common = [f"run.dir={folder}/run", f"data.cache_dir={folder}/data", "train.steps=2", "train.eval_every=0"]
        common += ["optimizer.warmup_steps=0", "log.every=1"]
        first = startup.command_to_first_step(config, common, num_procs=num_procs)
        again = [startup.command_to_first_step(config, common, num_procs=num_procs) for _ in range(3)]
        parts = startup.parts(config, [*common, "parallel.tp=1", "parallel.sequence_parallel=false"])
    lines = [
        fill(
            f"`toolkit train launch/recipes/quickstart.yaml --num-procs {num_procs}`: {first:.1f} s from the command to the first step line "
            f"where the data is prepared on the way, {statistics.median(again):.1f} s (median of {len(again)}) once it is there. "
            "Where a rank's time goes (one process, data prepared; before it come the command line and DeepSpeed's launcher):"
        ),
        "",
        "| Part | s (clock) | s (CPU) |",
        "|---|---|---|",
        *(f"| {name} | {wall:.2f} | {cpu:.2f} |" for name, (wall, cpu) in parts.items()),
    ]
    return "\n".join(lines)


def write(path: Path, blocks: dict[str, str]) -> None:
    """Replace the blocks between the file's generated markers; text around them is a person's and stays."""
    text = path.read_text(encoding="utf-8")
    for name, block in blocks.items():
        begin, end = BEGIN.format(name), END.format(name)
        if begin not in text or end not in text:
            raise SystemExit(f"{path} lacks the markers {begin} and {end}")
        head, rest = text.split(begin, 1)
        text = f"{head}{begin}\n{block}\n{end}{rest.split(end, 1)[1]}"
    path.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and, with --write, keep."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loops", default=",".join(NAMES), help="comma-separated; the first is what the others are compared with")
    parser.add_argument("--tiny", action="store_true", help="a shape for trying the bench itself")
    parser.add_argument("--no-startup", action="store_true")
    parser.add_argument("--write", type=Path, help="the Markdown file with the generated markers")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    shape = TINY if asked.tiny else Shape()
    size = {"rounds": asked.rounds, "steps": asked.steps, "threads": asked.threads}
    figures = measure(asked.loops.split(","), shape, **size)
    blocks = {"overhead": f"{table(figures, shape, **size)}\n\n{machine()}"}
    log.info("\n%s\n", blocks["overhead"])
    if not asked.no_startup:
        blocks["startup"] = start_up()
        log.info("%s", blocks["startup"])
    if asked.write:
        write(asked.write, blocks)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
