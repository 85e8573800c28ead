"""What keeping documents apart and a loss in pieces cost on this machine.

python -m tests.bench.long_context
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.model.attention import attend, document_spans
from toolkit.model.head import _Losses
from toolkit.parallel.loss_chunks import loss_chunk

S, HEADS, GROUPS, D = 4096, 8, 4, 64
TOKENS, HIDDEN, WORDS = 2048, 256, 16384
TRIES = 3


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
    """Seconds of the fastest of a few tries: what else runs here only adds."""
    seconds = []
    for _ in range(TRIES):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def documents() -> None:
    q, k, v = (torch.randn(1, n, S, D, requires_grad=True) for n in (HEADS, GROUPS, GROUPS))
    spans = document_spans([i * S // 8 for i in range(9)], S)
    plain = fastest(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward())
    apart = fastest(lambda: attend(q, k, v, spans).sum().backward())
    print(
        f"attention, forward and backward, {S} tokens: causal {plain * 1e3:.0f} ms, 8 documents {apart * 1e3:.0f} ms: {apart / plain:.2f}"
    )


def loss() -> None:
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

    for name, call in (("whole", whole), (f"pieces of {chunk} tokens", pieces)):
        hidden.grad = weight.grad = None
        with Peak() as peak:
            call()
        print(f"loss of {TOKENS} tokens, {WORDS} words, {name}: {fastest(call):.2f} s, {peak.peak / 2**20:.0f} MiB at most")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    documents()
    loss()
