"""How long kernels take on one GPU: matrix multiplies, attention and memory-bound passes, by shape."""

from __future__ import annotations

from toolkit.cost.constants import VALUES, cached
from toolkit.hardware.catalogue import GB, Gpu

# (rows, columns, share of the best rate): the tile shapes of cuBLAS/CUTLASS; small tiles reload operands more often
_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.94), (128, 64, 0.80), (64, 128, 0.80), (64, 64, 0.62))


@cached(maxsize=65536)
def matmul_time(m: int, n: int, k: int, *, gpu: Gpu, precision: str, scale: float = 1.0, batch: int = 1, kept: float = 0.0) -> float:
    """Seconds of C[m, n] = A[m, k] B[k, n], `batch` times: 2mnk FLOPs at the rate the shape allows, or its memory traffic.

    Tile and wave quantisation: whole tiles of C run in waves of one per SM (NVIDIA, "Matrix Multiplication Background
    User's Guide"); a tile's start and end cost tile_prologue accumulation steps; the reduction
    may be split over k. Widths that are no multiple of 8 elements rule out 16-byte loads (same guide, section 4.1).

    scale: the calibrated share of the catalogue's matmul ceiling; kept: bytes an element of C when it is read, added to and written back.
    """
    if min(m, n, k, batch) <= 0:
        return 0.0
    width = {"fp32": 4, "fp8": 1}.get(precision, 2)
    stream = gpu.memory_gb_s * GB * VALUES.stream_share
    rate = gpu.peak(precision) * gpu.matmul * scale / gpu.units  # FLOP/s of one SM
    if width == 2 and (k % 8 or n % 8):
        rate *= VALUES.misaligned
    best = float("inf")
    for rows, columns, share in _TILES:
        tiles = batch * -(-m // rows) * -(-n // columns)
        for split in (1, 2, 4) if k >= 2048 else (1,):
            jobs = tiles * split
            whole = -(-jobs // gpu.units)
            waves = whole if whole <= 2 else min(whole, jobs / gpu.units + VALUES.wave_tail)
            seconds = waves * 2 * rows * columns * (k / split + VALUES.tile_prologue) / (rate * share)
            if split > 1:
                seconds += 4 * m * n * batch * split / stream
            best = min(best, seconds)
    traffic = batch * (width * (m * k + k * n) + (2 * kept if kept else max(2, width)) * m * n)
    moved = traffic / stream
    stored = batch * (2 * kept if kept else max(2, width)) * m * n / stream
    return VALUES.kernel_launch + max(best + stored, moved)


def attention_kernel(gpu: Gpu, kernel: str) -> str:
    """The kernel family that runs when `kernel` is asked for: itself, or the newest the GPU has below it."""
    order = (
        ("cudnn", "flash4", "flash3", "flash2", "flash1")
        if kernel == "cudnn"
        else ("efficient", "triton", "flash4", "flash3", "flash2", "flash1")
    )
    start = order.index(kernel) if kernel in order else 0
    for name in (*order[start:], *gpu.attention):
        if name in gpu.attention:
            return name
    raise AssertionError("a catalogue entry has at least one attention kernel")


def attention_rate(gpu: Gpu, *, kernel: str, head_dim: int, seq: int, backward: bool) -> float:
    """Share of peak that fused causal attention sustains at a sequence length and head width.

    The catalogue's long-sequence figure for head dim 128, times seq/(seq + half) for the triangle's ragged edge and the
    start of each block row (half read off the length series of arXiv 2307.08691 and 2407.08608), and less for narrow
    heads, whose softmax work is the same for half the multiplies.
    """
    name = attention_kernel(gpu, kernel)
    share = gpu.attention[name][1 if backward else 0]
    half = VALUES.attention_half_backward if backward else VALUES.attention_half_forward
    early = name in ("triton", "flash1")  # their wide heads already spill registers: narrow ones lose less
    narrow = (
        1.0
        if head_dim >= 128 or (early and head_dim >= 64)
        else (0.85 if head_dim >= 96 else VALUES.narrow_head if head_dim >= 64 else 0.5)
    )
    if head_dim > 128:
        narrow = 0.85
    return share * narrow * seq / (seq + half)


@cached(maxsize=65536)
def flash_time(
    *, gpu: Gpu, precision: str, kernel: str, batch: int, seq: int, heads: float, head_dim: int, backward: bool, parts: int = 1
) -> float:
    """Seconds of fused causal attention over `batch` sequences of `seq` tokens, `heads` query heads on this rank.

    Forward 4·seq²·heads·head_dim FLOPs, halved by the causal mask; backward 2.5 times that (arXiv 2307.08691, section 4.1).
    parts: context-parallel ranks that share the triangle evenly (Megatron's zig-zag order); each works on shorter blocks.
    """
    precision = "bf16" if precision == "fp8" else precision
    flops = 2.0 * batch * seq * seq * heads * head_dim * (2.5 if backward else 1.0) / parts
    rate = attention_rate(gpu, kernel=kernel, head_dim=head_dim, seq=max(1, seq // parts), backward=backward)
    return VALUES.kernel_launch * parts + flops / (gpu.peak(precision) * rate)


def unfused_time(
    *,
    gpu: Gpu,
    precision: str,
    batch: int,
    seq: int,
    heads: int,
    head_dim: int,
    backward: bool,
    scale: float = 1.0,
    fused_softmax: bool = True,
) -> float:
    """Seconds of attention that writes the score matrix: two batched multiplies and passes over batch·heads·seq² scores.

    Passes, bytes a score: Megatron's fused scale-mask-softmax and dropout read and write 2-byte scores (9 forward,
    12 backward, arXiv 2205.05198 section 4.1 lists the tensors); separate kernels pass over them about three times as often.
    """
    products = batch * heads
    first = matmul_time(seq, seq, head_dim, gpu=gpu, precision=precision, scale=scale, batch=products)
    second = matmul_time(seq, head_dim, seq, gpu=gpu, precision=precision, scale=scale, batch=products)
    passes = (12 if backward else 9) * (1 if fused_softmax else 3)
    return (2 if backward else 1) * (first + second) + stream_time(passes * products * seq * seq, gpu=gpu)


def stream_time(nbytes: float, *, gpu: Gpu, kernels: int = 1) -> float:
    """Seconds of memory-bound kernels that move nbytes through device memory in all."""
    return kernels * VALUES.kernel_launch + nbytes / (gpu.memory_gb_s * GB * VALUES.stream_share)
