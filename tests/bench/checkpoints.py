"""`make bench-checkpoints`: what saving costs a run, against the same disk written in one go; resharding, against DeepSpeed's own tools.

Saves are a real engine's, on two processes under ZeRO-3. DeepSpeed saves the same state in its own format, and its tools and ours take
turns on the two. A larger checkpoint is resharded by itself: it is made of random numbers, since no engine of its size has room beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.overhead import fill, machine, write
from tests.checkpoint import synthetic
from tests.checkpoint.run import Sequences, prepared
from tests.checkpoint.watched import watched
from tests.pool import Pool
from tests.rank import Rank

log = logging.getLogger("bench")

GIB = 1 << 30
STEPS = 4
TO = ["parallel.tp=2", "parallel.pp=2", "zero.stage=2", "--num-procs", 4]


def model_of(gib: float) -> dict[str, Any]:
    """A Llama whose weights and Adam states take about so many GiB: 12 bytes a parameter."""
    small = gib < 0.1
    shape = {"hidden_size": 64, "ffn_hidden_size": 128, "vocab_size": 1024} if small else {}
    model = {"num_layers": 2, "hidden_size": 1024, "num_attention_heads": 16, "ffn_hidden_size": 2816, "vocab_size": 16384, **shape}
    model |= {"num_query_groups": 4 if small else 16, "max_position_embeddings": 32}
    two, four = (synthetic.state_bytes({**model, "num_layers": n})[0] for n in (2, 4))
    layers = 2 + 2 * max(0, round((gib * GIB - two) / (four - two)))  # two stages share them equally
    return {**model, "num_layers": layers}


def run(argument: dict[str, Any]) -> dict[str, list[float]]:
    """On every rank: train STEPS steps and save after each; then let DeepSpeed save, too."""
    from toolkit.runfolder.metrics import StepRecord

    rank = Rank(argument["config"], data=(prepared(Path(argument["config"]["run"]["dir"])), Sequences()))
    engine, checkpoints, micro = rank.engine, rank.checkpoints, rank.micro(1)
    found: dict[str, list[float]] = {"pause": [], "write": [], "deepspeed": []}
    assert checkpoints.saver is not None
    for step in range(1, STEPS + 1):
        rank.forward_backward(micro)
        engine.finish()
        record = StepRecord(step, 0.0, 0.0, 0.0, 0, 0.0, 0.0, None, 0.0, 0.0, 0.0)
        checkpoints.save(record, last=False)
        checkpoints.commit()
        checkpoints.settle()  # each save by itself, so that none waits for the one before
        found["pause"].append(record.save_pause_s or 0.0)
        found["write"].append(checkpoints.saver.write_seconds() or 0.0)
    checkpoints.release()
    if argument["deepspeed"]:
        started = time.perf_counter()
        engine.engine.save_checkpoint(argument["deepspeed"], tag="global_step1")
        found["deepspeed"].append(time.perf_counter() - started)
    return found


def saves(pool: Pool, folder: Path, model: dict[str, Any], *, asynchronous: bool, deepspeed: Path | None = None) -> dict[str, list[float]]:
    """Rank 0's seconds of each of STEPS saves."""
    config = {
        "run": {"dir": str(folder)},
        "model": model,
        "zero": {"stage": 3},
        "train": {"steps": STEPS, "global_batch_size": 2, "micro_batch_size": 1, "seq_length": 32, "precision": "fp32"},
        "checkpoint": {"every": 1, "keep": 1, "async_save": asynchronous},
    }
    answer = pool.run(f"{__spec__.name}:run", 2, {"config": config, "deepspeed": deepspeed and str(deepspeed)}, deadline_s=1800)
    result: dict[str, list[float]] = answer[0]
    return result


def sequential_write(path: Path, size: int) -> float:
    """Seconds to write `size` bytes to one new file and sync it, as `dd bs=4M conv=fsync` does."""
    block = os.urandom(1 << 22)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as f:
        for _ in range(size // len(block)):
            f.write(block)
        os.fsync(f.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def hashing(size: int = 1 << 28) -> float:
    """Seconds to take the sha256 of so many bytes on one core."""
    block = os.urandom(1 << 22)
    digest, started = hashlib.sha256(), time.perf_counter()
    for _ in range(size // len(block)):
        digest.update(block)
    return time.perf_counter() - started


def bytes_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def weights(source: Path, out: Path) -> None:
    """All fp32 weights as whole tensors: what zero_to_fp32 makes, in a process of its own."""
    from toolkit.checkpoint.weights import WeightsWriter, weights_manifest
    from toolkit.checkpoint.whole import WholeCheckpoint
    from toolkit.config.load import override_config

    with WholeCheckpoint(source) as whole, WeightsWriter(out, weights_manifest(override_config(whole.manifest.config, []))) as writer:
        for name in whole.names:
            writer.add(name, whole.read(name))


def measure(folder: Path, *, gib: float, reshard_gib: float, rounds: int) -> str:
    """All figures as Markdown."""
    model = model_of(gib)
    deepspeed, run_folder = folder / "deepspeed", folder / "saved"
    pool = Pool(2)
    try:
        log.info("saving from an engine of %.2f GiB of states", synthetic.state_bytes(model)[0] / GIB)
        quick = saves(pool, run_folder, model, asynchronous=True, deepspeed=deepspeed)
        slow = saves(pool, folder / "slow", model, asynchronous=False)
    finally:
        pool.close()
    source = run_folder / f"checkpoints/step-{STEPS:08d}"
    shutil.rmtree(folder / "slow")
    size, theirs = bytes_of(source), bytes_of(deepspeed)
    disk = statistics.median(sequential_write(folder / "disk", size) for _ in range(3))
    digest = hashing()
    lines = [
        fill(
            f"Llama of {model['num_layers']} layers x {model['hidden_size']}, fp32, ZeRO-3 on 2 processes, a checkpoint of {size / GIB:.2f} GiB; "
            f"medians of {STEPS - 1} saves after the first. One file of that size written in one go and synced: {disk:.2f} s, "
            f"{size / disk / 1e9:.2f} GB/s (median of 3); sha256 on one core: {(1 << 28) / digest / 1e9:.2f} GB/s."
        ),
        "",
        "| Save | training stands still | until the checkpoint counts | GB/s | of the sequential write |",
        "|---|---|---|---|---|",
    ]
    for name, found in (("`async_save: true`", quick), ("`async_save: false`", slow)):
        pause, total = (statistics.median(found[k][1:]) for k in ("pause", "write"))
        lines.append(f"| {name} | {pause:.2f} s | {total:.2f} s | {size / total / 1e9:.3f} | {disk / total:.0%} |")
    seconds = quick["deepspeed"][0]
    lines.append(
        f"| DeepSpeed's `save_checkpoint`, {theirs / GIB:.2f} GiB, neither synced nor hashed | {seconds:.2f} s | {seconds:.2f} s | {theirs / seconds / 1e9:.3f} | {theirs / size * disk / seconds:.0%} |"
    )
    lines += ["", *side_by_side(folder, source, deepspeed, rounds=rounds), "", *large(folder, reshard_gib), "", machine()]
    return "\n".join(lines)


def side_by_side(folder: Path, source: Path, deepspeed: Path, *, rounds: int) -> list[str]:
    """The toolkit's and DeepSpeed's tools on the same state, in turns; each run is a process from its start to its end."""
    out = folder / "out"
    tools: dict[str, tuple[list[object], int]] = {
        "**`toolkit checkpoint reshard`** to TP=2 x PP=2 x ZeRO-2": (["-m", "toolkit.cli", "checkpoint", "reshard", source, out, *TO], 3),
        "DeepSpeed's `ds_to_universal` (2 workers)": (
            ["-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", deepspeed / "global_step1", "--output_folder", out]
            + ["--inject_missing_state", "--num_extract_workers", "2", "--num_merge_workers", "2"],
            3,
        ),
        "**whole fp32 weights**, streamed": (["-m", __spec__.name, "--weights", source, out], 1),
        "DeepSpeed's `zero_to_fp32`": ([deepspeed / "zero_to_fp32.py", deepspeed, out, "-t", "global_step1"], 1),
    }
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in tools}
    for number in range(rounds):
        for name, (arguments, _) in tools.items() if number % 2 else reversed(tools.items()):
            found[name].append(watched(*arguments))
            shutil.rmtree(out)
            log.info("%s: %.1f s", name, found[name][-1][0])
    states = bytes_of(source) / 3
    lines = ["| The same state | seconds | GB/s of state | peak memory of a process |", "|---|---|---|---|"]
    for name, (_, parts) in tools.items():
        seconds, peak = (statistics.median(values) for values in zip(*found[name], strict=True))
        lines.append(f"| {name} | {seconds:.1f} | {states * parts / seconds / 1e9:.3f} | {peak / GIB:.2f} GiB |")
    return lines


def large(folder: Path, gib: float) -> list[str]:
    """Reshard a checkpoint of random numbers."""
    model = model_of(gib)
    states, largest = synthetic.state_bytes(model)
    log.info("making a checkpoint of %.1f GiB", states / GIB)
    source = synthetic.write(folder / "large", model, dp=2)
    seconds, peak = watched("-m", "toolkit.cli", "checkpoint", "reshard", source, folder / "larger", *TO)
    return [
        fill(
            f"`toolkit checkpoint reshard`, DP=2 x ZeRO-1 to TP=2 x PP=2 x ZeRO-2, {states / 12e9:.2f}B parameters ({states / GIB:.1f} GiB of states, made of "
            f"random numbers): {seconds:.0f} s, {states / seconds / 1e9:.3f} GB/s with every byte of the source held to its checksum and every "
            f"byte of the new one hashed and synced; peak {peak / GIB:.2f} GiB a process, where 2 x the largest tensor + 1 GiB are "
            f"{(2 * largest + GIB) / GIB:.2f} GiB."
        )
    ]


def main() -> None:
    """Measure, print and, with --write, keep."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="weights and optimizer states of the engine's checkpoint")
    parser.add_argument("--reshard-gib", type=float, default=17.0, help="of the one that is resharded alone")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each tool")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--write", type=Path, help="the Markdown file with the generated markers")
    parser.add_argument("--weights", type=Path, nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.weights:
        weights(*asked.weights)
        return
    with tempfile.TemporaryDirectory(prefix="bench-", dir=asked.folder) as folder:
        text = measure(Path(folder), gib=asked.gib, reshard_gib=asked.reshard_gib, rounds=asked.rounds)
    print(text)
    if asked.write:
        write(asked.write, {"checkpoints": text})


if __name__ == "__main__":
    main()
