"""How long the operators of a layer take on this machine: multiplies, attention, element-wise pieces, by size.

Each piece is the code that training runs. Forward passes keep their results, as autograd does, and backward passes take them in
the opposite order, so that memory is as cold as it is in a step.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, product
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, WIDTHS = (32, 128, 512, 2048), (64, 256, 1024)
SEQUENCES, HEADS, HEAD_WIDTHS = (64, 128, 256, 1024), 8, (32, 64)
ELEMENTS = (1 << 10, 1 << 14, 1 << 17, 1 << 19, 1 << 21)
WEIGHTS = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22)  # of the optimizer's pass and of plain copies
COLD, MOST = 64 << 20, 48  # bytes of tensors that take turns, more than caches hold; and how many at most
WIDTH = 256

Grid = list[list[float]]
Curves = list[list[list[float]]]


def quarter(times: Sequence[float]) -> float:
    """The time that a quarter of them stay below: what else a machine does makes some slower, and none faster."""
    return sorted(times)[len(times) // 4]


def seconds(call: Callable[[], object], *, least: float = 0.015, runs: int = 4) -> float:
    """Seconds of a call, repeated for `least` seconds and `runs` times at least, after one that does not count."""
    call()
    times: list[float] = []
    while len(times) < runs or (sum(times) < least and len(times) < 40):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return quarter(times)


def multiplies(dtype: torch.dtype) -> dict[str, Grid]:
    """Rows of tokens, outputs, inputs and seconds a FLOP, for each way in which a weight is multiplied."""
    rows: dict[str, Grid] = {"forward": [], "data": [], "weight": []}
    for tokens, out, inner in product(TOKENS, WIDTHS, WIDTHS):
        weights, x, y = (_in_turn(shape, dtype) for shape in ((out, inner), (tokens, inner), (tokens, out)))
        for way, multiply in _WAYS.items():
            kept: deque[Tensor] = deque(maxlen=_turns(tokens * max(out, inner)))  # as autograd keeps results
            rows[way].append([tokens, out, inner, seconds(partial(multiply, x, y, weights, kept)) / (2.0 * tokens * out * inner)])
    return rows


def _turns(elements: int) -> int:
    return max(3, min(MOST, COLD // (4 * elements)))


def _in_turn(shape: Sequence[int], dtype: torch.dtype) -> Iterator[Tensor]:
    """Tensors of a shape, one after the other and from the first again; an odd number, so that pairs change.

    Each is written once: zeros would all be read from the one page that the system keeps of them.
    """
    return cycle([torch.full(tuple(shape), 0.5, dtype=dtype) for _ in range(_turns(math.prod(shape)) | 1)])


Turn = Iterator[Tensor]
_WAYS: dict[str, Callable[[Turn, Turn, Turn, deque[Tensor]], object]] = {
    "forward": lambda x, y, weights, kept: kept.append(torch.matmul(next(x), next(weights).t())),
    "data": lambda x, y, weights, kept: kept.append(torch.matmul(next(y), next(weights))),
    "weight": lambda x, y, weights, kept: next(weights).addmm_(next(y).t(), next(x), beta=0.5),
}


def attention(dtype: torch.dtype) -> dict[str, Grid]:
    """Rows of sequence, head width and seconds of one head's s² d, forward and backward."""
    rows: dict[str, Grid] = {"forward": [], "backward": []}
    for s, d in product(SEQUENCES, HEAD_WIDTHS):
        q, k, v = (torch.randn(s, 1, HEADS, d, dtype=dtype).permute(1, 2, 0, 3).requires_grad_() for _ in range(3))
        attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        forward, backward = passes(attend, 4 * q.numel() * q.element_size())
        work = HEADS * float(s) ** 2 * d
        rows["forward"].append([s, d, forward / work])
        rows["backward"].append([s, d, backward / work])
    return rows


def passes(call: Callable[[], Tensor], nbytes: int) -> tuple[float, float]:
    """Seconds of forward and backward passes, of as many in a row as make memory cold."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(3):
        turns = max(3, min(MOST, COLD // max(1, nbytes)))
        found: tuple[list[float], list[float]] = ([], [])
        kept: list[Tensor] = []
        for _ in range(turns):
            started = time.perf_counter()
            kept.append(call())
            found[0].append(time.perf_counter() - started)
        gradient = torch.ones_like(kept[0])
        while kept:
            out = kept.pop()
            started = time.perf_counter()
            out.backward(gradient)
            found[1].append(time.perf_counter() - started)
        if turn:
            times[0].extend(found[0])
            times[1].extend(found[1])
    return quarter(times[0]), quarter(times[1])


def pieces(dtype: torch.dtype) -> dict[str, Curves]:
    """Elements and seconds, forward and backward, of each of toolkit.hardware.cpu.PIECES. Process groups must be up."""
    makers: dict[str, Callable[[int, torch.dtype], Callable[[], Tensor]]] = {
        "rms_norm": _rms_norm,
        "layer_norm": _layer_norm,
        "rotary": _rotary,
        "swiglu": _swiglu,
        "gelu": _gelu,
        "residual": _residual,
        "bias": _bias,
        "loss": _loss,
        "embedding": _embedding,
    }
    curves = {name: _curves(make, dtype) for name, make in makers.items()}
    for name, run in (("copy", _copy), ("add", _add), ("fresh", _fresh), ("adam", _adam)):
        points = [[n, seconds(run(n, dtype))] for n in WEIGHTS]
        curves[name] = [points, points]
    return curves


def _curves(make: Callable[[int, torch.dtype], Callable[[], Tensor]], dtype: torch.dtype) -> Curves:
    curves: Curves = [[], []]
    for n in ELEMENTS:
        for curve, found in zip(curves, passes(make(n, dtype), 4 * n * 2), strict=True):
            curve.append([n, found])
    return curves


def _stream(n: int, dtype: torch.dtype, width: int = WIDTH) -> Tensor:
    return torch.randn(n // width, 1, width, dtype=dtype).requires_grad_()


def _norm(kind: str, n: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    from toolkit.model import layers

    norm = getattr(layers, kind)(SimpleNamespace(params_dtype=dtype, norm_bias=True), WIDTH)
    x = _stream(n, dtype)
    return lambda: norm(x)  # type: ignore[no-any-return]


def _rms_norm(n: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    return _norm("RMSNorm", n, dtype)


def _layer_norm(n: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    return _norm("LayerNorm", n, dtype)


def _rotary(n: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    s = n // WIDTH
    x = torch.randn(s, 1, WIDTH // 64, 64, dtype=dtype).requires_grad_()
    angles = torch.randn(s, 1, 1, 64)
    config: Any = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    return lambda: apply_rotary_pos_emb(x, angles, config=config)  # type: ignore[no-any-return]


def _swiglu(n: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    both = torch.randn(n // WIDTH, 1, 2 * WIDTH, dtype=dtype).requires_grad_()

    def call() -> Tensor:  # as megatron-core's MLP
        gate, up = torch.chunk(both, 2, dim=-1)
        return F.silu(gate) * (up + 0.0)

    return call


def _gelu(n: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    x = _stream(n, dtype)
    return lambda: F.gelu(x, approximate="tanh")


def _residual(n: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    x, y = _stream(n, dtype), _stream(n, dtype)
    return lambda: x + y


def _bias(n: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    x, bias = _stream(n, dtype), torch.randn(WIDTH, dtype=dtype).requires_grad_()
    return lambda: x + bias


def _loss(n: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    width = 512
    tokens = max(1, n // width)
    logits = torch.randn(tokens, 1, width, dtype=dtype).requires_grad_()
    labels = torch.randint(width, (tokens, 1))
    # times one: the loss works on the logits in place
    return lambda: vocab_parallel_cross_entropy(logits * 1.0, labels)  # type: ignore[no-any-return]


def _embedding(n: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    table = torch.randn(n // WIDTH, WIDTH, dtype=dtype).requires_grad_()
    ids = torch.randint(n // WIDTH, (512, 1))
    return lambda: F.embedding(ids, table)


def _copy(n: int, dtype: torch.dtype) -> Callable[[], object]:
    tensors = _in_turn((n,), dtype)
    return lambda: next(tensors).copy_(next(tensors))


def _add(n: int, dtype: torch.dtype) -> Callable[[], object]:
    tensors = _in_turn((n,), dtype)
    return lambda: next(tensors).add_(next(tensors), alpha=1e-3)


def _fresh(n: int, dtype: torch.dtype) -> Callable[[], object]:
    """A copy into memory that the system gives anew and takes back, as it does with what is larger than 32 MiB."""
    tensors = _in_turn((n,), dtype)
    return lambda: torch.empty(max(n, 1 << 24), dtype=dtype).narrow(0, 0, n).copy_(next(tensors))


def _adam(n: int, dtype: torch.dtype) -> Callable[[], object]:
    """Gradients to zero, their norm, clipping and the update, over flat tensors as the engine keeps them."""
    weight = torch.zeros(n).requires_grad_()
    gradient = weight.grad = torch.zeros(n)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)

    def call() -> object:
        norm = torch.linalg.vector_norm(gradient)
        gradient.mul_(1.0 if norm < 1 else 0.5)
        return optimizer.step()

    return call
