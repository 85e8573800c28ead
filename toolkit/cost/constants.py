"""Every number of the formulas that no row, config or catalogue gives: its value, and where it comes from.

A constant is either stated (a datasheet, a paper, a line of a framework's code) or fitted. Fitted ones live in
toolkit/cost/fitted.py, which `python -m tests.bench.planner --fit` writes; the range in which a fit may move them and what
they mean are given here. docs/planner.md shows by how much each one moves the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, TypeVar

from toolkit.cost.fitted import FITTED

GB = 1e9
MIB, GIB = 2.0**20, 2.0**30


def _stated(value: float, source: str) -> Any:
    return field(default=value, metadata={"source": source})


def _fitted(name: str, *, prior: float, low: float, high: float, part: str, why: str) -> Any:
    """prior: the value where no source says otherwise; low, high: the range a fit may choose from; part: "time" or "memory", whichever the constant acts on."""
    return field(default=FITTED[name], metadata={"prior": prior, "low": low, "high": high, "part": part, "why": why})


@dataclass(kw_only=True)
class Constants:
    """Values by name; the source of each is its field's metadata. Seconds, bytes and shares."""

    # kernels
    stream_share: float = _stated(0.82, "our reading: a triad reaches 0.80 to 0.90 of datasheet bandwidth on A100 and H100; not verified")
    kernel_launch: float = _stated(2e-6, "gap between queued kernels, as any Nsight Systems trace of a full queue shows, 1 to 3 µs")
    tile_prologue: float = _stated(
        128.0, "our reading of CUTLASS's multistage main loop: three to four 32-wide stages to fill and drain; not verified"
    )
    attention_half_forward: float = _stated(500.0, "arXiv 2307.08691 and 2407.08608, figures 4 to 6: rate by sequence length")
    attention_half_backward: float = _stated(900.0, "arXiv 2307.08691 and 2407.08608, figures 4 to 6: rate by sequence length")
    narrow_head: float = _stated(0.80, "arXiv 2307.08691, figure 4: head width 64 against 128")
    wave_tail: float = _fitted("wave_tail", prior=0.3, low=0.1, high=0.6, part="time", why="waves lost at the end of a long multiply")
    misaligned: float = _fitted(
        "misaligned",
        prior=0.4,
        low=0.15,
        high=1.0,
        part="time",
        why="rate of a multiply whose inner or outer width is no multiple of 8 elements (16 bytes), over that of an aligned one",
    )
    fused_traffic: float = _fitted(
        "fused_traffic",
        prior=1.2,
        low=1.0,
        high=1.8,
        part="time",
        why="element-wise traffic of a layer with fused bias, dropout, casts and copies, over that of the fewest kernels",
    )
    eager_traffic: float = _fitted(
        "eager_traffic", prior=1.8, low=1.2, high=2.8, part="time", why="the same where PyTorch runs each operator by itself"
    )
    operator_host: float = _fitted(
        "operator_host",
        prior=8e-06,
        low=4e-6,
        high=2.5e-5,
        part="time",
        why="seconds in which Python and PyTorch's dispatcher launch one operator",
    )
    launch_wait: float = _stated(
        15e-6,
        "from a kernel's end to the next launch with CUDA_LAUNCH_BLOCKING=1, beside operator_host: it took 80 GPUs of BigScience from 97.2 to 91.0 TFLOPs (chronicles-prequel.md, dealing with JZ hanging), 3.6 ms a layer and micro-batch for 3 times 52 operators",
    )
    # links
    fabric_share: float = _stated(
        0.72,
        "our reading, amid what NCCL's issues report as bus bandwidth: 200 to 208 of 300 GB/s on A100 (nccl-tests 149, 178), 370 of 450 on H100 (nccl-tests 212)",
    )
    network_share: float = _stated(
        0.90, "our reading for InfiniBand with GPUDirect; not verified: NCCL's issue 495 reports 600 of 800 Gb/s over RoCE"
    )
    pcie_share: float = _stated(0.70, "our reading of copies of pinned memory, 22 to 24 of 32 GB/s on PCIe 4; not verified")
    fabric_step: float = _stated(3.4e-6, "NCCL, src/graph/tuning.cc, hwLat: a ring step over NVLink, Simple protocol")
    network_step: float = _stated(14e-6, "NCCL, src/graph/tuning.cc, hwLat: a ring step over the network, Simple protocol")
    collective_start: float = _stated(
        20e-6, "time of an 8-byte all-reduce: 20 µs on 2 GPUs in the log of nccl-tests' issue 293; for 8 our reading"
    )
    contention: float = _fitted(
        "contention",
        prior=0.3,
        low=0.0,
        high=0.7,
        part="time",
        why="share of hidden traffic by which compute slows: NCCL's kernels take SMs and bandwidth",
    )
    sharded_hidden: float = _fitted(
        "sharded_hidden", prior=0.9, low=0.5, high=1.0, part="time", why="share of compute beside which prefetched ZeRO traffic runs"
    )
    half_hidden: float = _fitted(
        "half_hidden",
        prior=0.2,
        low=0.0,
        high=0.5,
        part="time",
        why="share of compute beside which tensor-parallel traffic runs without user buffers",
    )
    whole_hidden: float = _fitted(
        "whole_hidden", prior=0.8, low=0.3, high=0.95, part="time", why="the same with user buffers or their like"
    )
    node_spread: float = _fitted(
        "node_spread", prior=0.008, low=0.0, high=0.03, part="time", why="standard deviation of a node's step time; the slowest counts"
    )
    # states and offload
    host_adam: float = _stated(
        4.0e9,
        "weights a second of DeepSpeed's CPU Adam on a two-socket node, about 0.25 s a billion: arXiv 2101.06840, table 4, from memory, not verified",
    )
    nvme: float = _stated(6.0 * GB, "our reading: bytes a second of two PCIe 4 drives' sequential rate, halved, one direction")
    copies_2: float = _stated(
        12.0,
        "DeepSpeed, stage_1_and_2.py, average_tensor and copy_grads_in_partition: a 16-bit gradient is copied into the bucket, divided in place and copied out, each a read and a write of 2 bytes",
    )
    copies_3: float = _stated(
        24.0,
        "DeepSpeed, stage3.py: the same, and partition_parameters.py: torch.cat makes each weight of its gathered parts in both passes; 4 bytes more are our reading",
    )
    bucket: float = _stated(5e8, "DeepSpeed's default reduce and gather bucket, elements (runtime/zero/config.py, reduce_bucket_size)")
    # memory
    workspace: float = _stated(
        64 * MIB,
        "PyTorch, CUDABlas' getChosenWorkspaceSize: 32 MiB a handle on Hopper and Blackwell, of which two are counted; 8 MiB on older GPUs",
    )
    context: float = _stated(0.45 * GIB, "nvidia-smi for an idle process of PyTorch with lazily loaded kernels (CUDA 11.7 and later)")
    old_context: float = _stated(
        1.45 * GIB,
        "the same before lazy loading: above 1 GB for PyTorch alone (its issues 28394, 107667); the rest for Apex's and own kernels is our reading",
    )
    communicator: float = _stated(
        0.06 * GIB,
        "our reading of NCCL's buffers of one communicator: 16 channels of NCCL_BUFFSIZE, 4 MiB, less what lazily connected peers leave out",
    )
    old_communicator: float = _fitted(
        "old_communicator",
        prior=0.3 * GIB,
        low=0.06 * GIB,
        high=0.8 * GIB,
        part="memory",
        why="bytes of a communicator before NCCL 2.14's lazily connected peers: channels times peers times 4 MiB and more",
    )
    spare: float = _fitted(
        "spare",
        prior=0.07,
        low=0.02,
        high=0.2,
        part="memory",
        why="share of what comes and goes that the caching allocator holds beyond it",
    )
    pipeline_spare: float = _fitted(
        "pipeline_spare",
        prior=0.25,
        low=0.04,
        high=0.4,
        part="memory",
        why="the same where activations of several micro-batches live and die out of order",
    )
    unmerged: float = _fitted(
        "unmerged",
        prior=1.0,
        low=0.0,
        high=1.0,
        part="memory",
        why="share of the flat buffers of the optimizer step that finds no place in freed activations' blocks",
    )

    own_spare: float = _stated(
        0.10, "rehearsals of this project's engine: median of what the allocator's model reserves beyond, ZeRO-0 and 1"
    )
    own_spare_2: float = _stated(0.25, "the same at ZeRO-2, whose buckets and reduced gradients live and die between activations")
    own_spare_3: float = _stated(0.40, "the same at ZeRO-3, whose gathered weights do")


VALUES = Constants()
Function = TypeVar("Function", bound=Callable[..., Any])
_caches: list[Any] = []


def cached(maxsize: int) -> Callable[[Function], Function]:
    """lru_cache for a function of the constants: its answers are forgotten when they change."""

    def wrap(function: Function) -> Function:
        kept = lru_cache(maxsize=maxsize)(function)
        _caches.append(kept)
        return kept  # type: ignore[return-value]

    return wrap


@contextmanager
def changed(**values: float) -> Iterator[None]:
    """Other values inside a with block, for fits and sensitivities. Not for several threads at once."""
    before = {name: getattr(VALUES, name) for name in values}
    try:
        use(values)
        yield
    finally:
        use(before)


def use(values: dict[str, float]) -> None:
    """Put other values in place, and forget the answers of the old ones."""
    if all(getattr(VALUES, name) == value for name, value in values.items()):
        return
    for name, value in values.items():
        setattr(VALUES, name, value)
    for kept in _caches:
        kept.cache_clear()


def fitted_names(part: str | None = None) -> list[str]:
    """The constants a fit may move; part: "time" or "memory"."""
    return [f.name for f in fields(Constants) if "low" in f.metadata and part in (None, f.metadata["part"])]


def about(name: str) -> dict[str, Any]:
    """A constant's metadata: source, or low, high, part and why."""
    return next(dict(f.metadata) for f in fields(Constants) if f.name == name)
