"""Bytes a rank really holds: an engine's tensors by part, what autograd keeps for the backward,
every live storage over time.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.engine.deepspeed_state import bucket_tensors, held_tensors

STATIC = ("parameters", "gradients", "optimizer", "zero buffers")
RECOMPUTED = "recomputed"


def storage_bytes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the distinct storages behind tensors, by the storage's address: views of one buffer
    count once.
    """
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if tensor.is_meta or tensor.layout != torch.strided:
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes():
            sizes[storage._cdata] = storage.nbytes()
    return sizes


def inventory(engine: Any) -> dict[str, dict[str, int]]:
    """Bytes of each static part of an engine (toolkit.engine.zero.Engine), by device type:
    {"parameters": {"cpu": n}, …}.

    A storage that several parts share (fp32 weights that are their own master copy) counts for the
    first of them.
    zero buffers: whatever else DeepSpeed's optimizer holds.
    """
    claimed: set[int] = set()
    parts: dict[str, dict[str, int]] = {}
    for part, tensors in held_tensors(engine).items():
        parts[part] = {}
        for tensor in tensors:
            for address, nbytes in storage_bytes([tensor]).items():
                if address not in claimed:
                    claimed.add(address)
                    kind = tensor.device.type
                    parts[part][kind] = parts[part].get(kind, 0) + nbytes
    return parts


class _SavedTensor:
    """One tensor that autograd keeps. Its storage counts until the last of them is freed."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Saved:
    """Counts what forward keeps for backward, by part; storages of `apart` (weights and their
    buffers) do not count.

    now: bytes by part; at_peak: bytes by part at the moment their sum was largest, without
    RECOMPUTED, which a backward makes and
    frees again. part: what is being computed now.
    """

    def __init__(self, apart: Iterable[Tensor]) -> None:
        # keep references: an address is reused once its storage is freed
        self.apart = {t.untyped_storage()._cdata: weakref.ref(t.untyped_storage()) for t in apart if not t.is_meta}
        self.part = "activations"
        self.now: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self.holders: dict[int, int] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count within this context."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor):
            yield

    def _pack(self, tensor: Tensor) -> _SavedTensor:
        saved = _SavedTensor(tensor)
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return saved  # DeepSpeed frees a gathered ZeRO-3 weight even while autograd refers to it
        storage = tensor.untyped_storage()
        address, nbytes = storage._cdata, storage.nbytes()
        known = self.apart.get(address)
        if not nbytes or (known is not None and known() is not None):
            return saved
        if address not in self.holders:
            self.holders[address] = 0
            self.now[self.part] = self.now.get(self.part, 0) + nbytes
            if self.part != RECOMPUTED:
                without_recomputed = {part: count for part, count in self.now.items() if part != RECOMPUTED}
                if sum(without_recomputed.values()) > sum(self.at_peak.values()):
                    self.at_peak = without_recomputed
        self.holders[address] += 1
        weakref.finalize(saved, self._freed, address, nbytes, self.part).atexit = False
        return saved

    def _freed(self, address: int, nbytes: int, part: str) -> None:
        self.holders[address] -= 1
        if not self.holders[address]:
            del self.holders[address]
            self.now[part] -= nbytes


class Live(TorchDispatchMode):
    """Follows every storage on one type of device from its first appearance to its end while
    active, those that exist already included.

    now, peak: bytes; samples: (seconds since the start, bytes) at each change, thinned to at most
    `most` points that keep the peaks.
    """

    def __init__(self, kind: str = "cpu", *, most: int = 2000) -> None:
        super().__init__()
        self.kind = kind
        self.storages: dict[int, int] = {}
        self.now = self.peak = 0
        self.most = most
        self.samples: list[tuple[float, int]] = []
        self.started = time.perf_counter()

    def __enter__(self) -> Any:
        gc.collect()
        for item in gc.get_objects():
            if issubclass(type(item), Tensor):
                self._see(item)
        self.started = time.perf_counter()
        self.peak, self.samples = self.now, [(0.0, self.now)]
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self._see(item)
            elif isinstance(item, (tuple, list)):
                for inner in item:
                    if isinstance(inner, Tensor):
                        self._see(inner)
        return result

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type != self.kind or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        address, nbytes = storage._cdata, storage.nbytes()
        if not nbytes or address in self.storages:
            return
        self.storages[address] = nbytes
        weakref.finalize(storage, self._end, address).atexit = False
        self._change(nbytes)

    def _end(self, address: int) -> None:
        self._change(-self.storages.pop(address, 0))

    def _change(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        self.samples.append((time.perf_counter() - self.started, self.now))
        if len(self.samples) > 2 * self.most:
            self.samples = thinned(self.samples, most=self.most)


def thinned(samples: list[tuple[float, int]], *, most: int) -> list[tuple[float, int]]:
    """At most `most` of the samples: the lowest and the highest of each stretch, so that no peak is lost."""
    if len(samples) <= most:
        return samples
    size = -(-2 * len(samples) // most)
    kept_samples: list[tuple[float, int]] = []
    for start in range(0, len(samples), size):
        stretch = samples[start : start + size]
        ends = {min(stretch, key=lambda s: s[1]), max(stretch, key=lambda s: s[1])}
        kept_samples += sorted(ends)
    return kept_samples


@dataclass
class StepMemory:
    """One optimizer step's bytes on this rank.

    parts: the largest of each; host: of each static part in host memory, beside a GPU; samples:
    (seconds, live bytes) over time.
    """

    parts: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    samples: list[tuple[float, int]] = field(default_factory=list)


class StepMeter:
    """Measures the step run while it is entered; its around() must enclose every forward and every backward.

    follow: also follow every storage, which costs each operation some microseconds (off: peak and
    samples stay empty). "working set" in parts is what the peak holds beside all other parts:
    gradients on their way, results of single operations.
    """

    def __init__(self, engine: Any, *, follow: bool = True) -> None:
        self.engine = engine
        self.measured = StepMemory()
        self.saved = Saved(tensor for tensors in held_tensors(engine).values() for tensor in tensors)
        self.kind = engine.device.type  # offloaded tensors do not count on the device
        self.live = Live(self.kind) if follow else None
        self.stack = ExitStack()

    def __enter__(self) -> StepMeter:
        for chunk in self.engine.chunks:
            if chunk.post_process:
                handle = chunk.output_layer.register_forward_pre_hook(lambda *_: setattr(self.saved, "part", "logits"))
                self.stack.callback(handle.remove)
            # note the buckets here: DeepSpeed frees them at the end of every backward
            handle = next(chunk.parameters()).register_post_accumulate_grad_hook(lambda _: self._note_buckets())
            self.stack.callback(handle.remove)
        wrapped: Any = self.engine.engine
        step = wrapped.step

        def noted_step(*args: Any, **kwargs: Any) -> Any:
            self._note()
            return step(*args, **kwargs)

        wrapped.step = noted_step
        self.stack.callback(setattr, wrapped, "step", step)
        if self.live is not None:
            self.stack.enter_context(self.live)
        self.stack.enter_context(self.saved.counting())
        return self

    @contextmanager
    def around(self, kind: str) -> Iterator[None]:
        """kind: forward or backward."""
        self.saved.part = "activations" if kind == "forward" else RECOMPUTED
        yield
        if kind == "backward":
            self._note()

    def __exit__(self, *exception: Any) -> None:
        self.stack.close()
        if exception[0] is not None:
            return
        self._note()
        parts = self.measured.parts
        parts |= {"activations": self.saved.at_peak.get("activations", 0), "logits": self.saved.at_peak.get("logits", 0)}
        if self.live is not None:
            self.measured.peak, self.measured.samples = self.live.peak, thinned(self.live.samples, most=400)
            parts["working set"] = max(0, self.live.peak - sum(parts.values()))

    def _note_buckets(self) -> None:
        nbytes = sum(storage_bytes(bucket_tensors(self.engine)).values())
        self.measured.parts["zero buffers"] = max(self.measured.parts.get("zero buffers", 0), nbytes)

    def _note(self) -> None:
        for part, by_device in inventory(self.engine).items():
            self.measured.parts[part] = max(self.measured.parts.get(part, 0), by_device.get(self.kind, 0))
            if self.kind != "cpu":
                self.measured.host[part] = max(self.measured.host.get(part, 0), by_device.get("cpu", 0))
