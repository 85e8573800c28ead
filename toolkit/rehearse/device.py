"""Stand-ins for a GPU that is not there; production code never imports this file.

    library = guard.ensure(); load(library)      # before torch is imported
    device = install("cuda", listener)           # torch.cuda answers, and reports what it is asked to listener
    with device.tensors(): ...                   # every tensor made here has a shape, a type and a device, and no data

install("cpu", listener) does the same for a rehearsal of a CPU run, where only tensors without data are new.
Nothing is undone: a process that has stand-ins is for rehearsals alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Listener:
    """What the stand-ins report; a recorder overrides what it wants to know."""

    def sync(self, kind: str) -> None:
        """The host waits for the device."""

    def wait(self, stream: int, moment: Any) -> None:
        """A stream waits for a moment that mark() returned."""

    def mark(self, stream: int) -> Any:
        """The end of what a stream has been given so far."""
        return None

    def used_elsewhere(self, tensor: Any, stream: int) -> None:
        """Tensor.record_stream."""

    def pinned(self, tensor: Any) -> None:
        """A tensor has been copied to page-locked host memory."""

    def memory(self, what: str) -> int:
        """An answer for torch.cuda.memory_allocated and its like."""
        return 0


LOADED: list[ctypes.CDLL] = []


def load(library: Path) -> None:
    """Load the C++ stand-ins; must come before torch, which asks for a GPU's hooks once."""
    if "torch" in sys.modules:
        raise RuntimeError("the stand-ins of a GPU must be loaded before torch")
    LOADED.append(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
    os.environ["DS_ACCELERATOR"] = "cuda"
    os.environ["LOCAL_RANK"] = "0"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is there is left alone: what asks it after all fails at once


LOWER_RIGHT = object()  # in the place of torch.nn.attention.bias.causal_lower_right's result


class Device:
    """The device that is played: its name for torch, and the stream that operators go to now.

    known: values in host memory that the program reads, by dtype and shape.
    """

    def __init__(self, kind: str, listener: Listener) -> None:
        self.kind = kind
        self.known: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
        self.listener = listener
        self.stream = 0
        self.streams = 1
        self._mode: Any = None

    @contextlib.contextmanager
    def tensors(self) -> Iterator[None]:
        """Within this context every new tensor is one without data."""
        from toolkit.rehearse.shapes import ShapeMode

        class Mode(ShapeMode):
            avoid_device_init = self.kind == "cuda"  # torch.tensor(…, device="cuda") would ask for real memory there

        if self._mode is None:
            self._mode = Mode(allow_non_fake_inputs=True)
        with self._mode:
            yield


def install(kind: str, listener: Listener, *, gpu: str = "NVIDIA H100 80GB HBM3", memory: int = 80 << 30, gpus: int = 8) -> Device:
    """Put the stand-ins in place for this process; kind: cuda or cpu."""
    import torch
    import torch.distributed as dist
    import torch.distributed._tools.fake_collectives

    device = Device(kind, listener)
    if kind == "cuda":
        _cuda(device, gpu=gpu, memory=memory, gpus=gpus)
    backend = "nccl" if kind == "cuda" else "gloo"
    anything: Any = dist
    anything.get_backend = dist.distributed_c10d.get_backend = lambda *_, **__: backend  # type: ignore[assignment]
    _values(device)
    _objects()
    _operators(device)
    # .to(device) and .half() of a module whose tensors are as asked for already: FakeTensors cannot
    # be swapped in place
    apply = torch.nn.Module._apply

    def unchanged(self: Any, function: Any, recurse: bool = True) -> Any:
        with torch.no_grad():
            if all(function(t) is t for t in [*self.parameters(), *self.buffers()]):
                return self
        return apply(self, function, recurse)

    torch.nn.Module._apply = unchanged  # type: ignore[method-assign]
    return device


def open_world(rank: int, size: int) -> None:
    """A default process group of any size in which this process is one rank and nobody answers."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)


def _values(device: Device) -> None:
    """What needs values of tensors: random generators, pinned memory, DeepSpeed's CPU optimizer."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, "cpu")  # type: ignore  # there is no other without a GPU, and nothing is drawn

    anything: Any = torch
    if device.kind == "cuda":
        anything.Generator = Generator
    tensor: Any = torch.Tensor
    pinned = "_rehearsed_pinned"

    def pin(self: Any, *_: Any, **__: Any) -> Any:
        copy = self.clone()
        setattr(copy, pinned, True)
        device.listener.pinned(copy)
        return copy

    def values(self: Any) -> Any:
        """One copy to the host, however many values; of what lies there, what the rehearsal knows."""
        known = device.known.get((self.dtype, tuple(self.shape))) if self.device.type == "cpu" else None
        if known is not None:
            return list(known)
        flat = self.reshape(-1)
        value = flat[0].item() if len(flat) else 0
        for size in reversed(self.shape):
            value = [value] * size
        return value

    FakeTensor.tolist = values  # type: ignore[method-assign]
    tensor.pin_memory = pin
    tensor.is_pinned = lambda self, *_, **__: getattr(self, pinned, False)


def _objects() -> None:
    """What ranks tell each other as objects: every other rank is taken to say what this one says."""
    import torch.distributed as dist

    def gathered(everyone: list[Any], mine: Any, *_: Any, **__: Any) -> None:
        everyone[:] = [mine] * len(everyone)

    dist.all_gather_object = gathered  # type: ignore[assignment]
    dist.broadcast_object_list = lambda *_, **__: None  # type: ignore[assignment]


class CpuAdam:
    """In the place of DeepSpeed's compiled optimizer, which would read the tensors' memory."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: 0


def install_optimizer(deepspeed: Any) -> None:
    """In the place of what DeepSpeed compiles for optimizer states on the CPU; call it once
    deepspeed is imported.
    """
    deepspeed.ops.op_builder.CPUAdamBuilder.load = lambda self, *_, **__: CpuAdam()


def _operators(device: Device) -> None:
    """The kernels that a GPU runs and that torch would take apart for tensors without data."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import bias

    aten: Any = torch.ops.aten
    anything: Any = F
    masks: Any = bias
    plain = F.scaled_dot_product_attention

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if attn_mask is LOWER_RIGHT:  # every kernel that takes it is one of those below, with as many keys as there are
            attn_mask, is_causal = None, True
        if attn_mask is not None:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        half = query.dtype in (torch.float16, torch.bfloat16)
        if device.kind == "cpu" and dropout_p == 0.0:
            return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if device.kind == "cuda" and half and query.shape[-1] <= 256:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        if device.kind == "cuda" and query.shape[1] == key.shape[1]:
            grad = torch.is_grad_enabled() and query.requires_grad
            return aten._scaled_dot_product_efficient_attention(query, key, value, None, grad, dropout_p, is_causal, scale=scale)[0]
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    anything.scaled_dot_product_attention = attention
    masks.causal_lower_right = lambda *_: LOWER_RIGHT  # its own class cannot be made of a tensor without data
    # it changes what is there and returns nothing, and torch has no word for that without data
    Device.missing = torch.library.Library("aten", "IMPL", "Meta")  # type: ignore[attr-defined]
    Device.missing.impl("_fused_sgd_", lambda *_, **__: None)  # type: ignore[attr-defined]
    if device.kind == "cuda":
        _fused_rms_norm()


def _fused_rms_norm() -> None:
    """A GPU's RMSNorm is one kernel that keeps its input and one fp32 number a row; the CPU build
    knows only the chain of operators.
    """
    import torch
    import torch.nn.functional as F

    library = torch.library.Library("rehearse", "DEF")
    library.define("rms_norm(Tensor x, Tensor weight) -> (Tensor, Tensor)")
    library.define("rms_norm_backward(Tensor gradient, Tensor x, Tensor statistics, Tensor weight) -> (Tensor, Tensor)")

    def forward_shapes(x: Any, weight: Any) -> Any:
        return x.new_empty(x.shape), x.new_empty((*x.shape[: -weight.dim()], 1), dtype=torch.float32)

    def backward_shapes(gradient: Any, x: Any, statistics: Any, weight: Any) -> Any:
        return x.new_empty(x.shape), weight.new_empty(weight.shape)

    library.impl("rms_norm", forward_shapes, "Meta")
    library.impl("rms_norm_backward", backward_shapes, "Meta")
    Device.libraries = library  # type: ignore[attr-defined]  # the operators live as long as it does
    ops: Any = torch.ops.rehearse

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any) -> Any:
            out, statistics = ops.rms_norm(x, weight)
            ctx.save_for_backward(x, weight, statistics)
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            x, weight, statistics = ctx.saved_tensors
            return ops.rms_norm_backward(gradients[0].contiguous(), x, statistics, weight)

    plain = F.rms_norm

    def rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
        return plain(x, normalized_shape, weight, eps) if weight is None else Norm.apply(x, weight)

    anything: Any = F
    anything.rms_norm = rms_norm


def _cuda(device: Device, *, gpu: str, memory: int, gpus: int) -> None:
    """Everything of torch.cuda that the program, megatron-core and DeepSpeed ask for."""
    import torch
    from torch._subclasses import fake_tensor

    for library in LOADED:
        library.toolkit_guard()  # a CUDA build of torch has put its own in the place of ours
    fake_tensor.init_gpu_context = lambda *_: None  # type: ignore[assignment]  # a first tensor, which would ask for real memory
    listener = device.listener
    here = torch.device("cuda", 0)

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.moment: Any = None

        def record(self, stream: Any = None) -> None:
            self.moment = listener.mark(device.stream if stream is None else stream.number)

        def wait(self, stream: Any = None) -> None:
            if self.moment is not None:
                listener.wait(device.stream if stream is None else stream.number, self.moment)

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            listener.sync("event.synchronize")

        def elapsed_time(self, other: Any) -> float:
            return 1.0  # of two events that have passed: it waits for none

    class Stream:
        cuda_stream, device = 0, here

        def __init__(self, *_: Any, number: int | None = None, **__: Any) -> None:
            if number is None:
                number, device.streams = device.streams, device.streams + 1
            self.number = number

        def wait_stream(self, other: Any) -> None:
            listener.wait(self.number, listener.mark(other.number))

        def wait_event(self, event: Any) -> None:
            event.wait(self)

        def record_event(self, event: Any = None) -> Any:
            event = event or Event()
            event.record(self)
            return event

        def synchronize(self) -> None:
            listener.sync("stream.synchronize")

        def query(self) -> bool:
            return True

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Stream) and other.number == self.number

        def __hash__(self) -> int:
            return self.number

    class Generators:
        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: torch.zeros(16, dtype=torch.uint8)

    class Properties:
        name, major, minor, total_memory, multi_processor_count = gpu, 9, 0, memory, 132

    default = Stream(number=0)

    @contextlib.contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        before = device.stream
        device.stream = before if stream is None else stream.number
        try:
            yield
        finally:
            device.stream = before

    c: Any = torch.cuda
    # each name its own function: torch's compiler keys its rules by identity
    c.default_generators = [Generators()] * gpus
    c.is_available = lambda: True
    c.device_count = lambda: gpus
    c.current_device = lambda: 0
    c.is_initialized = lambda: True
    c.is_current_stream_capturing = lambda: False
    c.set_device = lambda *_: None
    c._lazy_init = lambda: None
    c.init = lambda: None
    c.manual_seed = lambda *_: None
    c.synchronize = lambda *_, **__: listener.sync("cuda.synchronize")
    c.Stream, c.Event = Stream, Event
    c.current_stream = lambda *_: Stream(number=device.stream)
    c.default_stream = lambda *_: default
    c.stream = on_stream
    c.get_rng_state = c.random.get_rng_state = lambda *_, **__: torch.zeros(16, dtype=torch.uint8)
    c.set_rng_state = c.random.set_rng_state = lambda *_, **__: None
    c.get_device_name = lambda *_: gpu
    c.get_device_capability = lambda *_: (9, 0)
    c.is_bf16_supported = lambda *_, **__: True
    c.get_device_properties = lambda *_: Properties
    c.mem_get_info = lambda *_: (memory - listener.memory("reserved"), memory)
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "memory_cached",
        "max_memory_cached",
    ):
        what = name.replace("max_memory_", "peak ").replace("memory_", "").replace("cached", "reserved")
        setattr(c, name, lambda *_, what=what: listener.memory(what))
    for name in ("empty_cache", "reset_peak_memory_stats", "reset_max_memory_cached", "reset_max_memory_allocated"):
        setattr(c, name, lambda *_, what=name: listener.memory(what))
    c.set_per_process_memory_fraction = lambda *_, **__: None
    c.nccl.version = lambda: (2, 0, 0)
    c.memory._record_memory_history = lambda *_, **__: None
    c.memory._dump_snapshot = lambda path="dump_snapshot.pickle": Path(path).write_bytes(b"")
    c.nvtx.range_push = lambda *_, **__: None
    c.nvtx.range_pop = lambda *_, **__: None
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, stream: listener.used_elsewhere(self, stream.number)
    tensor.cuda = lambda self, *_, non_blocking=False, **__: self.to(here, non_blocking=non_blocking)
