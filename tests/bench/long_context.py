"""What long context costs: figures measured on this machine, and what the planner and the rehearsal say of GPUs.

python -m tests.bench.long_context [--write docs/long-context.md]      # make bench-long-context
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.bench.long_context_pictures import pictures
from tests.bench.overhead import write
from tests.pool import Pool
from toolkit.config.load import parse_config
from toolkit.hardware.catalogue import parse_hardware
from toolkit.model.attention import attend, document_spans
from toolkit.model.head import _Losses
from toolkit.parallel.loss_chunks import loss_chunk
from toolkit.plan.reasons import duration
from toolkit.plan.search import Plan
from toolkit.plan.tune import Question
from toolkit.rehearse.session import Job, prepare, run

S, HEADS, GROUPS, D = 4096, 8, 4, 64
TOKENS, HIDDEN, WORDS = 2048, 256, 16384
TRIES = 3
GIB = 2**30


class Peak(TorchDispatchMode):
    """The most bytes that results of operations hold at a time, of storages that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return out


def fastest(call: Callable[[], Any]) -> float:
    """CPU seconds of the fastest of a few tries: what else runs here only adds."""
    seconds = []
    for _ in range(TRIES):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return min(seconds)


def documents() -> list[str]:
    """Attention over eight documents against one."""
    q, k, v = (torch.randn(1, n, S, D, requires_grad=True) for n in (HEADS, GROUPS, GROUPS))
    spans = document_spans([i * S // 8 for i in range(9)], S)
    plain = fastest(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward())
    apart = fastest(lambda: attend(q, k, v, spans).sum().backward())
    return [
        f"| attention to {S:,} tokens, causal | {plain * 1e3:.0f} ms |  |",
        f"| 8 documents in them | {apart * 1e3:.0f} ms | {apart / plain:.2f} |",
    ]


def loss() -> list[str]:
    """The loss whole and in pieces: time, and bytes at the peak."""
    hidden = torch.randn(TOKENS, 1, HIDDEN, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(WORDS, HIDDEN) * 0.02)
    labels = torch.randint(0, WORDS, (TOKENS, 1))
    group: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    head: Any = SimpleNamespace(sequence_parallel=False, gradient_accumulation_fusion=False, tp_group=group)
    head.logits = lambda rows, weight: (rows @ weight.t()).float()
    chunk = loss_chunk("always", tokens=TOKENS, columns=WORDS)

    def whole() -> None:
        F.cross_entropy((hidden @ weight.t()).flatten(0, 1).float(), labels.flatten()).backward()

    def pieces() -> None:
        _Losses.apply(hidden, weight, labels, head, chunk).mean().backward()

    rows, first = [], 0.0
    for name, call in ((f"loss of {TOKENS:,} tokens of {WORDS:,} words, whole", whole), (f"in pieces of {chunk} tokens", pieces)):
        hidden.grad = weight.grad = None
        with Peak() as peak:
            call()
        seconds = fastest(call)
        rows.append(
            f"| {name}, {peak.peak / 2**20:.0f} MiB at most | {seconds * 1e3:.0f} ms | {f'{seconds / first:.2f}' if first else ''} |"
        )
        first = first or seconds
    return rows


RUN: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 4, "ffn_hidden_size": 256}
    | {"vocab_size": 512, "max_position_embeddings": 8192},
    "zero": {"stage": 1},
    "train": {"global_batch_size": 1, "micro_batch_size": 1, "seq_length": 8192, "precision": "fp32"},
}


def steps(raw: dict[str, Any]) -> dict[str, float]:
    """On a rank: seconds of CPU time in a step's forward and backward, and on the clock."""
    from tests.rank import Rank

    rank = Rank(raw)
    rank.step(0)
    micro, cpu, wall = rank.micro(1), [], []
    for _ in range(TRIES):
        begun = time.process_time(), time.perf_counter()
        rank.forward_backward(micro)
        cpu.append(time.process_time() - begun[0])
        wall.append(time.perf_counter() - begun[1])
        rank.engine.finish()
    return {"cpu": min(cpu), "wall": median(wall)}


def context() -> list[str]:
    """Forward and backward of the same tokens on one process and shared among 2 and 4."""
    pool = Pool(4)
    try:
        one = pool.run("tests.bench.long_context:steps", 1, RUN, deadline_s=600)[0]
        rows = [f"| a step of {RUN['train']['seq_length']:,} tokens, one process | {one['cpu']:.2f} s | {one['wall']:.2f} s |  |  |"]
        for cp in (2, 4):
            for exchange in ("allgather", "ulysses", "ring"):
                raw = RUN | {"parallel": {"cp": cp, "cp_exchange": exchange}}
                ranks = pool.run("tests.bench.long_context:steps", cp, raw, deadline_s=600)
                cpu = [r["cpu"] for r in ranks]
                spread = 100 * (max(cpu) / min(cpu) - 1)
                wall = max(r["wall"] for r in ranks)
                rows.append(f"| cp {cp}, {exchange} | {max(cpu):.2f} s | {wall:.2f} s | {sum(cpu) / one['cpu']:.2f} | {spread:.1f} % |")
        return rows
    finally:
        pool.close()


def measured() -> str:
    cores = len(os.sched_getaffinity(0))
    return "\n".join(
        [
            f"On {cores} cores with one thread a process, the fastest of {TRIES} tries; the last column is against the row",
            "above.",
            "",
            "| what | CPU time | against |",
            "|---|---|---|",
            *documents(),
            *loss(),
            "",
            "A Llama of 2 layers x 128, forward and backward. A rank's CPU time is what its work takes, whatever",
            "else runs; more processes than cores take turns on the clock.",
            "",
            "| what | CPU time of the busiest rank | on the clock | all ranks' CPU time over one process's | busiest over idlest |",
            "|---|---|---|---|---|",
            *context(),
        ]
    )


def logits() -> str:
    """A rehearsal of the loss over 128k tokens and 128k words, whole and in pieces."""
    model = {"num_layers": 1, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8, "ffn_hidden_size": 14336}
    model |= {"vocab_size": 131072, "max_position_embeddings": 131072}
    jobs = []
    for mode in ("never", "auto"):
        train = {"seq_length": 131072, "global_batch_size": 1, "recompute": "full", "precision": "bf16", "chunked_loss": mode}
        config, _ = prepare(parse_config({"model": model, "zero": {"stage": 1}, "train": train}), parse_hardware("h200-141gb:1"))
        jobs.append(Job(config=config, world=1, rank=0, steps=1, hardware="h200-141gb:1"))
    whole, pieces = run(jobs)
    rows = ["| loss | GiB at the peak | which is in |", "|---|---|---|"]
    for name, answer in (("whole", whole), ("in pieces", pieces)):
        module = answer["step"]["peak"]["module"]
        where = "the loss" if module in ("", "model") else f"`{module}`"
        rows.append(f"| {name} | {answer['allocated'] / GIB:.1f} | {where} |")
    return "\n".join(rows)


PLANS = (
    ("llama3-8b", 131072, "h100-80gb:8", 8),
    ("llama3-8b", 131072, "h100-80gb:8x4", 32),
    ("llama3-8b", 262144, "h100-80gb:8x8", 32),
    ("llama3-8b", 1048576, "h100-80gb:8x16", 16),
    ("llama3-70b", 131072, "h100-80gb:8x16", 64),
    ("llama3-70b", 1048576, "h100-80gb:8x64", 16),
)


def plans() -> str:
    """The best plan for speed of each model, length and cluster."""
    rows = ["| model | tokens | H100 | sequences a step | plan | GiB a rank | step |", "|---|---|---|---|---|---|---|"]
    for preset, seq, cluster, batch in PLANS:
        scaling = {"type": "llama3", "factor": seq / 8192, "original_max_position_embeddings": 8192}
        model = {"preset": preset, "vocab_size": 128256, "max_position_embeddings": seq, "rope_scaling": scaling}
        config = parse_config({"model": model, "train": {"global_batch_size": batch, "seq_length": seq, "precision": "bf16"}})
        hardware = parse_hardware(cluster)
        found = Question(config=config, hardware=hardware).ask(top=1).plans
        length = f"{seq // 1024}k" if seq < 2**20 else f"{seq // 2**20}M"
        name = preset.replace("llama3-", "Llama-3 ").replace("b", "B")
        plan = (_words(found[0]), f"{found[0].worst.device / GIB:.1f}", duration(found[0].time.step)) if found else ("none fits", "", "")
        rows.append(f"| {name} | {length} | {hardware.count} | {batch} | {' | '.join(plan)} |")
    return "\n".join(rows)


def _words(plan: Plan) -> str:
    w = plan.workload
    parts = [f"tp {w.tp}" + (" with sp" if w.sp else "")] if w.tp > 1 else []
    parts += [f"{axis} {getattr(w, axis)}" for axis in ("pp", "vpp", "cp", "dp") if getattr(w, axis) > 1]
    parts += [w.exchange] if w.cp > 1 else []
    parts += [f"ZeRO-{w.zero}"] + ([f"{w.recompute} recompute"] if w.recompute != "none" else [])
    places = (("optimizer", w.offload_optimizer), ("parameters", w.offload_param))
    return ", ".join(parts + [f"{what} on the {where.upper()}" for what, where in places if where != "none"])


PARTS: dict[str, Callable[[], str]] = {"measured": measured, "logits": logits, "plans": plans}


def main() -> None:
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path)
    parser.add_argument("--only", choices=PARTS, action="append")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if arguments.write:
        for name, svg in pictures().items():
            (arguments.write.parent / name).write_text(svg)
    for name in arguments.only or PARTS:
        text = PARTS[name]()
        print(text, end="\n\n", flush=True)
        if arguments.write:
            write(arguments.write, {name: text})


if __name__ == "__main__":
    main()
