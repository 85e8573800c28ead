"""The first and last words of a run: what it is; what it did, where its weights are, and the
commands that go on from there.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from toolkit.config.schema import RunConfig
from toolkit.evidence.expected import STEP, of_run
from toolkit.hardware.catalogue import Hardware, gpu_of_device
from toolkit.parallel.exchange import chosen_exchange
from toolkit.runfolder.files import CONFIG
from toolkit.runfolder.metrics import StepRecord, thousands
from toolkit.runfolder.pace import hours
from toolkit.train.resolve import ResolvedRun


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """record: of the last step, None where none was left to take; taken: steps of this process, of
    all that the run has; seconds: since it began; evaluated: the last step that was, None without;
    checkpoint: the newest one, None without; own_data: whether a program gave the data, so that its
    config alone does not start the run; device: its name, "cpu" without a GPU.
    """

    record: StepRecord | None
    taken: int
    seconds: float
    tokens_per_s: float | None
    evaluated: StepRecord | None
    checkpoint: Path | None
    processes: int
    hosts: int
    own_data: bool = False
    device: str = "cpu"


def closing_lines(config: RunConfig, outcome: Outcome) -> list[str]:
    """One line of what the run did, then the commands a user may want next, each ready to be pasted."""
    record, steps = outcome.record, config.train.steps
    finished = record is None or record.step >= steps
    lines = []
    if record is not None:
        lines.append(_did(config, outcome, record, finished=finished))
        lines += _expected(config, outcome, record)
    commands = _commands(config, outcome, finished=finished)
    label = "next: " if finished else "go on: "
    lines += [f"{label if i == 0 else ' ' * len(label)}{command}" for i, command in enumerate(commands)]
    return lines


def _did(config: RunConfig, outcome: Outcome, record: StepRecord, *, finished: bool) -> str:
    steps = config.train.steps
    took = f"{outcome.taken:,} step{'' if outcome.taken == 1 else 's'} in {_seconds(outcome.seconds)}"
    parts = [f"done: step {record.step}/{steps}" if finished else f"not done: step {record.step}/{steps}", took]
    parts.append(f"loss {record.loss:.4f}" if record.loss is not None else "loss not finite")
    if outcome.evaluated is not None:
        when = f" (step {outcome.evaluated.step})" if outcome.evaluated.step != record.step else ""
        parts.append(f"eval loss {outcome.evaluated.eval_loss:.4f}{when}")
    if outcome.tokens_per_s is not None:
        parts.append(f"{thousands(outcome.tokens_per_s)} tok/s")
    if outcome.checkpoint is not None:
        parts.append(f"checkpoint {outcome.checkpoint}")
    else:
        parts.append("no checkpoint: checkpoint.every is 0, so the weights are gone")
    return " | ".join(parts)


def _expected(config: RunConfig, outcome: Outcome, record: StepRecord) -> list[str]:
    """What the estimate had said of a run on GPUs that the catalogue knows, with the 80 % interval;
    on a CPU it says little.
    """
    gpu = gpu_of_device(outcome.device)
    if outcome.tokens_per_s is None or gpu is None or not gpu.accelerator:
        return []
    hosts = max(1, outcome.hosts)
    hardware = Hardware(gpu=gpu, gpus_per_node=-(-outcome.processes // hosts), nodes=hosts, nic_gb_s=gpu.nic_gb_s)
    figures = of_run(config, hardware, rate=outcome.tokens_per_s, peak_gib=record.memory_gib)
    parts = []
    for figure in figures:
        likely, interval, _ = figure.words
        if figure.name != STEP:  # one over the tokens a second
            where = "as measured" if figure.verdict == "inside" else f"measured {figure.verdict} it"
            parts.append(f"{figure.name} {likely} ({interval}), {where}")
    return ["expected (four of five cases): " + " | ".join(parts)]


def _commands(config: RunConfig, outcome: Outcome, *, finished: bool) -> list[str]:
    run = str(config.run.dir)
    report = _words("toolkit", "report", run, "-o", os.path.join(run, "report.html"))
    if not finished:
        again = "start your program again" if outcome.own_data else _train(config, outcome)
        if outcome.checkpoint is None:
            return [f"{again}   (from step 1; checkpoint.every=N would have kept what it learnt)", report]
        return [again, report]
    if outcome.checkpoint is None:
        return [report]
    checkpoint = str(outcome.checkpoint)
    # a run folder stands for its newest checkpoint, where the checkpoints lie in it
    checkpoint = run if outcome.checkpoint.parent == config.run.dir / "checkpoints" else checkpoint
    export = _words("toolkit", "convert", "export", checkpoint, os.path.join(run, "hf"))
    return [_words("toolkit", "evaluate", checkpoint) + " DATA", export, report]


def _train(config: RunConfig, outcome: Outcome) -> str:
    command = _words("toolkit", "train", str(config.run.dir / CONFIG))
    if outcome.hosts > 1:
        return f"{command} --hostfile HOSTFILE"
    return f"{command} --num-procs {outcome.processes}"


def _words(*words: str) -> str:
    return shlex.join(words)


def _seconds(seconds: float) -> str:
    return hours(seconds) if seconds >= 600 else f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


def opening_lines(resolved: ResolvedRun, *, device: str, seconds: float) -> list[str]:
    """What a run is and how it is laid out, and its data. seconds: from the start of its build
    until it is ready.
    """
    config, layout = resolved.config, resolved.layout
    m, z, t = config.model, config.zero, config.train
    places = (("optimizer", z.offload_optimizer), ("parameters", z.offload_param))
    shared = f" cp {layout.cp}" if layout.cp > 1 else ""
    degrees = f"tp {layout.tp} pp {layout.pp} vpp {layout.vpp}{shared} dp {layout.dp}" + (" sp" if layout.sequence_parallel else "")
    exchange = chosen_exchange(config) if layout.cp > 1 else None
    return [
        f"{m.preset or m.family}, {m.spec.unpadded_parameters:,} parameters | {degrees}"
        f" | ZeRO-{z.stage}{''.join(f', {what} on {where}' for what, where in places if where != 'none')} | {t.precision}"
        f" | {t.global_batch_size} sequences of {t.seq_length} tokens a step,"
        f" {layout.num_microbatches} micro-batches of {t.micro_batch_size} | {device}",
        *([f"context parallel by {exchange.name}: {exchange.reason}"] if exchange is not None else []),
        f"data: {resolved.data.summary} | ready in {seconds:.1f} s",
    ]
