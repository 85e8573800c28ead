"""`make calibrate-cpu`: the predicted and the measured step of configurations on this machine's CPU, into docs/cpu-time.md.

`toolkit calibrate` comes first, and sees none of them. Ranks then take the configurations one after the other, twice: in order and
backwards, so that a machine that grows slower shows. A step is what a quarter of its steps after the first ones stay below.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from toolkit.calibrate.distance import alike, handover_seconds
from toolkit.calibrate.pieces import quarter
from toolkit.cluster.environment import rank_environment
from toolkit.config.load import as_config
from toolkit.config.schema import RunConfig
from toolkit.cost.cpu_step import cpu_step_time
from toolkit.cost.workload import Workload
from toolkit.hardware.catalogue import parse_hardware
from toolkit.hardware.cpu import CpuRates, load_cpu

log = logging.getLogger("bench")
WARM_UP, SECONDS, FEWEST, MOST, TRIES = 2, 1.6, 5, 24, 3
PROFILED = 2  # steps whose parts are told apart, after the timed ones
PARTS = {  # of an estimate, by what `toolkit profile` tells apart
    "compute": ("matmul", "attention", "memory-bound kernels", "recompute", "launches"),
    "optimizer": ("optimizer",),
    "messages and waiting": (
        *("tensor parallel", "context parallel", "pipeline sends", "pipeline bubble", "zero gathers", "data parallel"),
        *("offload", "stragglers", "shared cores"),
    ),
}


@dataclass(frozen=True)
class Case:
    """One configuration. size: hidden width and layers; batch: micro-batch and micro-batches of a step; layout: other keys."""

    family: str
    size: tuple[int, int]
    vocabulary: int
    seq: int
    batch: tuple[int, int]
    ranks: int = 1
    threads: int = 2
    layout: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        hidden, layers = self.size
        keys = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in self.layout)
        return f"{self.family} {layers} × {hidden}, {self.vocabulary} ids, {self.batch[1]} × {self.batch[0]} × {self.seq}{', ' if keys else ''}{keys}"

    def config(self, folder: Path) -> RunConfig:
        """The run's config."""
        hidden, layers = self.size
        keys = dict(self.layout)
        heads = max(2, hidden // 64)
        copies = self.ranks // (keys.get("parallel.tp", 1) * keys.get("parallel.pp", 1))
        model = {
            "family": self.family,
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_query_groups": heads // 2 if self.family == "llama" and heads % 4 == 0 else heads,
            "ffn_hidden_size": hidden * (3 if self.family == "llama" else 4),
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.seq,
            "tie_embeddings": False,
        }
        train = {
            "steps": 1000,
            "global_batch_size": self.batch[0] * self.batch[1] * copies,
            "micro_batch_size": self.batch[0],
            "seq_length": self.seq,
            "precision": "fp32",
            "watchdog_s": 0,
        }
        sections = {"run": {"dir": str(folder)}, "model": model, "train": train, "data": {"workers": 0}, "log": {"every": 100_000}}
        return as_config(sections, {"zero.stage": 1, **keys})


def _of(**keys: Any) -> tuple[tuple[str, Any], ...]:
    full = {
        "tp": "parallel.tp",
        "pp": "parallel.pp",
        "sp": "parallel.sequence_parallel",
        "zero": "zero.stage",
        "recompute": "train.recompute",
    }
    return tuple((full[name], value) for name, value in keys.items())


CASES = (
    Case("llama", (128, 2), 512, 64, (2, 2), 1, 2, _of(zero=1)),
    Case("llama", (256, 4), 2048, 128, (4, 1), 1, 2, _of(zero=1)),
    Case("llama", (256, 8), 1024, 256, (1, 4), 1, 2, _of(zero=0)),
    Case("llama", (384, 4), 4096, 128, (2, 2), 1, 2, _of(zero=1)),
    Case("llama", (512, 4), 1024, 256, (2, 1), 1, 2, _of(zero=1)),
    Case("llama", (768, 2), 2048, 128, (4, 1), 1, 2, _of(zero=1)),
    Case("llama", (256, 4), 1024, 512, (1, 2), 1, 2, _of(zero=1, recompute="full")),
    Case("llama", (384, 4), 1024, 128, (4, 2), 1, 2, _of(zero=2)),
    Case("llama", (256, 6), 2048, 128, (2, 2), 1, 2, _of(zero=3)),
    Case("gpt", (128, 4), 1024, 128, (2, 2), 1, 2, _of(zero=1)),
    Case("gpt", (256, 4), 4096, 256, (2, 1), 1, 2, _of(zero=1)),
    Case("gpt", (512, 2), 2048, 128, (2, 4), 1, 2, _of(zero=1)),
    Case("gpt", (384, 6), 1024, 64, (4, 2), 1, 2, _of(zero=2)),
    Case("llama", (128, 8), 512, 128, (2, 2), 1, 1, _of(zero=1)),
    Case("llama", (256, 4), 1024, 128, (4, 2), 1, 1, _of(zero=1)),
    Case("gpt", (384, 2), 2048, 128, (2, 2), 1, 1, _of(zero=1)),
    Case("llama", (512, 2), 1024, 128, (2, 2), 1, 1, _of(zero=3)),
    Case("llama", (256, 4), 1024, 128, (4, 2), 2, 1, _of(zero=1, tp=2)),
    Case("llama", (512, 4), 2048, 128, (2, 1), 2, 1, _of(zero=1, tp=2)),
    Case("llama", (384, 4), 1024, 128, (4, 2), 2, 1, _of(zero=1, tp=2, sp=True)),
    Case("gpt", (256, 4), 1024, 256, (2, 1), 2, 1, _of(zero=1, tp=2)),
    Case("llama", (256, 4), 1024, 128, (2, 4), 2, 1, _of(zero=1, pp=2)),
    Case("llama", (384, 8), 512, 128, (2, 2), 2, 1, _of(zero=1, pp=2)),
    Case("gpt", (256, 8), 1024, 128, (2, 2), 2, 1, _of(zero=2, pp=2)),
    Case("llama", (256, 4), 1024, 128, (4, 1), 2, 1, _of(zero=1)),
    Case("llama", (384, 4), 2048, 128, (2, 2), 2, 1, _of(zero=2)),
    Case("llama", (512, 2), 1024, 128, (4, 1), 2, 1, _of(zero=3)),
    Case("gpt", (256, 6), 2048, 128, (2, 2), 2, 1, _of(zero=0)),
    Case("llama", (256, 4), 1024, 128, (2, 2), 4, 1, _of(zero=1, tp=2, pp=2)),
    Case("llama", (256, 4), 1024, 128, (2, 2), 4, 1, _of(zero=1, tp=2)),
)
# what the formulas were tried on while they were written; the page does not count them
TRIED = (
    Case("llama", (192, 3), 768, 96, (3, 2), 1, 2, _of(zero=1)),
    Case("llama", (320, 5), 1536, 192, (2, 2), 1, 2, _of(zero=1)),
    Case("gpt", (320, 3), 1536, 160, (2, 2), 1, 2, _of(zero=1)),
    Case("llama", (320, 3), 1536, 128, (2, 2), 1, 2, _of(zero=2)),
    Case("llama", (320, 3), 1536, 128, (2, 2), 1, 2, _of(zero=3)),
    Case("llama", (320, 3), 1536, 128, (2, 2), 1, 1, _of(zero=1)),
    Case("llama", (320, 4), 1536, 128, (2, 2), 2, 1, _of(zero=1)),
    Case("llama", (320, 4), 1536, 128, (2, 2), 2, 1, _of(zero=3)),
    Case("llama", (256, 3), 1536, 160, (2, 2), 2, 1, _of(zero=1, tp=2)),
    Case("llama", (320, 6), 1536, 128, (2, 3), 2, 1, _of(zero=1, pp=2)),
)


def predicted(case: Case, rates: CpuRates, *, handover_s: float = 0.0) -> tuple[float, dict[str, float]]:
    """Seconds of a step with the cores at a distance, and its parts as `toolkit profile` tells them apart."""
    hardware = replace(parse_hardware(f"cpu:{case.ranks}"), cpu=rates, threads=case.threads)
    estimate = cpu_step_time(Workload.of(case.config(Path("runs")), case.ranks), hardware, handover_s=handover_s)
    return estimate.step, {part: sum(estimate.parts[name] for name in names) for part, names in PARTS.items()}


def measure(cases: Sequence[Case], numbers: Sequence[int], *, folder: Path) -> Iterator[dict[str, Any]]:
    """One record of each turn of the numbered cases: seconds of its step, and of its parts on the rank that computes longest."""
    for ranks in sorted({cases[i].ranks for i in numbers}):
        mine = [i for i in numbers if cases[i].ranks == ranks]
        out = folder / f"cases-{ranks}.jsonl"
        env = rank_environment(ranks, environ={**os.environ, "OMP_NUM_THREADS": str(max(cases[i].threads for i in mine))})
        command = [
            sys.executable,
            "-m",
            "tests.bench.cpu_time",
            "--rank",
            str(out),
            *map(str, mine),
            *(["--tried"] if cases is TRIED else []),
        ]
        places = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(ranks)} for r in range(ranks)]
        with (folder / f"log-{ranks}").open("w") as said:
            processes = [subprocess.Popen(command, env=env | place, stdout=said, stderr=subprocess.STDOUT) for place in places]
            if any([process.wait() for process in processes]):
                raise SystemExit((folder / f"log-{ranks}").read_text()[-3000:])
        for line in out.read_text().splitlines():
            yield json.loads(line)


def run_rank(out: Path, cases: Sequence[Case], numbers: Sequence[int]) -> None:
    """One rank of so many: takes the cases in order and backwards."""
    import torch
    import torch.distributed as dist

    from toolkit.data.given import GivenData
    from toolkit.train.loop import Run
    from toolkit.train.resolve import resolve
    from toolkit.train.world import World, connect

    logging.disable(logging.WARNING)
    world = World.from_environment()
    for turn, order in enumerate((numbers, numbers[::-1])):
        for i in order:
            case = cases[i]
            torch.set_num_threads(case.threads)
            data = GivenData(train=_tokens(case), masked=False)
            resolved = resolve(case.config(out.parent / f"run-{i}-{turn}"), world.size, given=data)
            connect(world, resolved.layout, seed=1, meeting=str(out.with_suffix(".meeting")))
            run = Run(resolved, world)
            try:
                record = _steps(run, case, world)
            finally:
                run.close()
            everyone: list[Any] = [None] * world.size
            dist.all_gather_object(everyone, record)
            if world.rank == 0:
                slowest = max(everyone, key=lambda r: r["parts"]["compute"])
                with out.open("a") as file:
                    file.write(
                        json.dumps({**slowest, "case": i, "turn": turn, "step": everyone[0]["step"], "times": everyone[0]["times"]}) + "\n"
                    )
    dist.destroy_process_group()


def _tokens(case: Case) -> Any:
    from toolkit.calibrate.programs import Tokens

    return Tokens(samples=1 << 20, length=case.seq, ids=case.vocabulary)


def _steps(run: Any, case: Case, world: Any) -> dict[str, Any]:
    """Median seconds of a step, and mean seconds of its parts on this rank."""
    import torch
    import torch.distributed as dist

    from toolkit.profile.session import Session

    def one(number: int) -> float:
        record, _ = run._step(number)
        return float(record.step_s)

    def apart() -> float:
        found = torch.tensor([handover_seconds() if world.rank == 0 else 0.0], dtype=torch.float64)
        dist.broadcast(found, 0)
        return float(found)

    session = Session(run, world, run.layout, Path(), None)  # type: ignore[arg-type]
    times = [one(n + 1) for n in range(WARM_UP)]
    done = WARM_UP
    count = torch.tensor([min(MOST, max(FEWEST, round(SECONDS / times[-1])))])
    dist.broadcast(count, 0)
    after = apart()
    for _ in range(TRIES):  # again where the machine's host has moved the cores meanwhile
        before = after
        times = [one(done + n + 1) for n in range(int(count))]
        session.step = done + len(times)
        parts = session._timed(PROFILED)["seconds"]
        done, after = session.step + 1, apart()
        if alike(before, after):
            break
    return {
        "handover_s": before,
        "moved": not alike(before, after),
        "step": median(times),
        "steps": len(times),
        "times": times,
        "parts": {
            "compute": parts["forward"] + parts["backward"],
            "optimizer": parts["optimizer"],
            "messages and waiting": parts["communication"] + parts["other"] + parts["data wait"],
            "forward": parts["forward"],
            "backward": parts["backward"],
        },
    }


def rows(cases: Sequence[Case], records: Sequence[Mapping[str, Any]], rates: CpuRates) -> list[dict[str, Any]]:
    """A row of each case that was measured: predicted and measured seconds, error, parts, and how far its two turns are apart."""
    found = []
    for i, case in enumerate(cases):
        mine = [r for r in records if r["case"] == i]
        if not mine:
            continue
        # each turn beside what is predicted for the distance at which the cores were then
        turns = [predicted(case, rates, handover_s=r["handover_s"]) for r in mine]
        likely = mean(seconds for seconds, _ in turns)
        parts = {part: mean(p[part] for _, p in turns) for part in turns[0][1]}
        step, middle = mean(quarter(r["times"]) for r in mine), mean(r["step"] for r in mine)
        measured = {part: mean(r["parts"][part] for r in mine) for part in mine[0]["parts"]}
        apart = max(r["step"] for r in mine) / min(r["step"] for r in mine) - 1
        found.append(
            {
                "case": case,
                "predicted": likely,
                "measured": step,
                "middle": likely / middle - 1,
                "error": likely / step - 1,
                "apart": apart,
                "handovers": [r["handover_s"] for r in mine],
                "p": parts,
                "m": measured,
            }
        )
    return found


def table(found: Sequence[Mapping[str, Any]], rates: CpuRates, *, machine: str) -> str:
    """The rows as a Markdown table, with what they come to."""
    from tests.bench.overhead import fill

    off = sorted(abs(r["error"]) for r in found)
    within = sum(e <= 0.15 for e in off)
    apart = sorted(r["apart"] for r in found)
    middle = sum(abs(r["middle"]) <= 0.15 for r in found)
    lines = [
        fill(
            f"**{within} of {len(found)} within 15 %**; median error {median(off):.1%}, largest {off[-1]:.0%}. Two turns of the same "
            f"configuration differ by {median(apart):.0%} (median), up to {apart[-1]:.0%}: no prediction can be nearer than that. Against "
            f"the median of all steps, {middle} are within 15 %."
        ),
        "",
        "| configuration (layers × width, micro-batches × sequences × tokens) | ranks × threads | predicted, ms | measured, ms | error "
        "| turns apart | hand-over, ns | compute, ms | optimizer, ms | messages and waiting, ms |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in found:
        parts = " | ".join(f"{1e3 * r['p'][part]:.1f} / {1e3 * r['m'][part]:.1f}" for part in PARTS)
        case = r["case"]
        lines.append(
            f"| {case.name} | {case.ranks} × {case.threads} | {1e3 * r['predicted']:.1f} | {1e3 * r['measured']:.1f} | {r['error']:+.0%} "
            f"| {r['apart']:.0%} | {', '.join(f'{1e9 * s:.0f}' for s in r['handovers'])} | {parts} |"
        )
    far = [r for r in found if abs(r["error"]) > 0.15]
    if far:
        lines += ["", "Not reached, and the part that is off most:", ""]
        for r in far:
            part = max(PARTS, key=lambda name: abs(r["p"][name] - r["m"][name]))
            gap = 1e3 * (r["p"][part] - r["m"][part])
            lines.append(fill(f"- {r['case'].name}: {r['error']:+.0%}; {part} {gap:+.0f} ms of {1e3 * r['measured']:.0f}"))
    return "\n".join([*lines, "", fill("Parts are predicted / measured, of the rank that computes longest."), "", machine])


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate (or take --calibration), measure (or take --records) and, with --write, keep."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.cpu_time", description=__doc__)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("numbers", nargs="*", type=int, help="cases to measure; default: all")
    parser.add_argument("--tried", action="store_true", help="the cases on which the formulas were tried")
    parser.add_argument("--calibration", type=Path, help="a file of toolkit calibrate, instead of a new one")
    parser.add_argument(
        "--records",
        type=Path,
        help="JSON lines of measurements, which new ones are added to; without numbers, cases in it are not measured again",
    )
    parser.add_argument("--write", type=Path, help="the Markdown file with the generated markers")
    asked = parser.parse_args(arguments)
    cases = TRIED if asked.tried else CASES
    if asked.rank:
        run_rank(asked.rank, cases, asked.numbers)
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    from tests.bench.overhead import machine, write

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        calibration = asked.calibration
        if calibration is None:
            calibration = Path(folder) / "calibration.yaml"
            subprocess.run([sys.executable, "-m", "toolkit", "calibrate", "--out", str(calibration)], check=True)
        rates = load_cpu(calibration)
        assert rates is not None
        records = [json.loads(line) for line in asked.records.read_text().splitlines()] if asked.records and asked.records.exists() else []
        wanted = asked.numbers or range(len(cases))
        known = set() if asked.numbers else {r["case"] for r in records}
        for record in measure(cases, [i for i in wanted if i not in known], folder=Path(folder)):
            records.append(record)
            if asked.records:
                with asked.records.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    block = table(rows(cases, records, rates), rates, machine=machine(packages=False))
    log.info("%s", block)
    if asked.write:
        write(asked.write, {"cpu-time": block})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
