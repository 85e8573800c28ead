"""What a rank does, written down as it does it: operators, kernels, waits and host
synchronisations, with their places.

A TorchDispatchMode sees every operator; storages.py counts their memory and wire.py the messages.
It works on tensors without data (a rehearsal) and on real ones (the run that a rehearsal is held
to).
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.rehearse.device import Listener
from toolkit.rehearse.host import HostMemory
from toolkit.rehearse.modules import Modules
from toolkit.rehearse.place import device_of, here, tensors_of
from toolkit.rehearse.price import Price
from toolkit.rehearse.step import Peak, Step
from toolkit.rehearse.storages import Storages
from toolkit.rehearse.wire import Wire

_VIEWS = {"_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "detach_", "set_", "resize_"}
_ON_THE_HOST = ("data/loader.py", "checkpoint/save.py")  # pinned batches and generators' states are there on purpose
_NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "device", "is_pinned", "sym_size", "sym_numel"}


class Recorder(TorchDispatchMode):
    """Active from before the model is built, so that the allocator sees all. kind: the device type
    that counts.
    """

    def __init__(self, kind: str, *, price: Price | None = None, capacity: int | None = None, rank: int = 0) -> None:
        super().__init__()
        self.kind, self.price, self.rank = kind, price, rank
        self.step = Step()
        self.storages = Storages(kind, capacity=capacity)
        self.host = HostMemory()
        self.running = Modules()
        self.wire = Wire(rank, price=price, step=lambda: self.step, stream=lambda: self.stream)
        self.phase = "building"
        self.operators = 0
        self.device: Any = None  # toolkit.rehearse.device.Device, whose current stream operators go to
        self._kinds: dict[Any, str] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's wrapper against it would cost more than most operators

    # -- operators ----------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = self._kinds.get(func) or self._kind_of(func)
        if kind == "device" and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if kind == "view":
            return func(*args, **(kwargs or {}))
        if kind == "scalar":
            return self._read(func, args, kwargs or {})
        self.operators += 1
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            if self.storages.see(tensor, stream=self.stream):
                self._grown(func)
            elif self.kind == "cuda":
                self.host.see(tensor)
        if kind != "none":
            self._kernel(func, kind, args, kwargs or {}, result)
        return result

    def _kind_of(self, func: Any) -> str:
        space, name = func.namespace, func._schema.name.split("::")[-1]
        if space == "prim" and name == "device":
            kind = "device"
        elif name in ("_local_scalar_dense", "item", "equal", "is_nonzero"):
            kind = "scalar"
        elif func.is_view or name in _VIEWS:
            kind = "view"
        elif space in ("c10d", "prim", "profiler") or name in _NO_KERNEL:
            kind = "none"
        elif name in ("mm", "addmm", "bmm", "baddbmm", "addmm_"):
            kind = "matmul"
        elif name.startswith("_scaled_dot_product"):
            kind = "attention backward" if "backward" in name else "attention"
        else:
            kind = "copy" if name in ("_to_copy", "copy_") else "stream"
        self._kinds[func] = kind
        return kind

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The host reads a value: a real one where there is one, else what a healthy run would see there."""
        tensor = args[0]
        if device_of(tensor) == "cuda":
            self.sync("a value is read")
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            if func._schema.name.endswith("equal"):
                return True
            if tensor.dtype == torch.bool:
                return getattr(tensor, "_rehearsed_by", "") in ("aten::isfinite", "aten::all", "aten::equal")
            return 1.0 if tensor.dtype.is_floating_point else 1

    def _kernel(self, func: Any, kind: str, args: Any, kwargs: Any, result: Any) -> None:
        name = func._schema.name
        outputs = tensors_of(result)
        if outputs and outputs[0].dtype == torch.bool and outputs[0].dim() == 0:
            outputs[0]._rehearsed_by = name  # type: ignore[attr-defined]
        inputs = [t for value in (*args, *kwargs.values()) for t in tensors_of(value)]
        places = {device_of(t) for t in (*inputs, *outputs)}
        if self.kind not in places:
            if self.kind == "cuda" and any(t.numel() > 16 for t in outputs) and not (place := here()).startswith(_ON_THE_HOST):
                self.step.elsewhere[name, place] += 1
            return
        if kind == "copy" and len(places) > 1:
            big = max((t.numel() * t.element_size() for t in (*inputs, *outputs)), default=0)
            # a copy out of the device always waits unless it is told not to; one into it waits for
            # memory that is not pinned
            if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True)) and big > 8:
                self.sync("a copy between host and device")
            self._run("copy " + name, self.price.host_copy(big) if self.price else 0.0)
            return
        self.step.kernels[name] += 1
        if self.price is None:
            return
        shapes = [t.shape for t in inputs]
        if kind == "matmul":
            left, right = shapes[-2:]
            seconds = self.price.matmul(left, right, str(inputs[-1].dtype))
        elif kind == "attention":
            seconds = self.price.attention(inputs[0].shape, str(inputs[0].dtype), backward=False)
        elif kind == "attention backward":
            seconds = self.price.attention(inputs[1].shape, str(inputs[0].dtype), backward=True)
        else:
            own = {id(t) for t in inputs}
            moved = sum(t.numel() * t.element_size() for t in (*inputs, *(t for t in outputs if id(t) not in own)))
            seconds = self.price.stream(moved)
        self._run(name, seconds)

    def _run(self, name: str, seconds: float) -> None:
        stream, program = self.stream, self.step.program
        if not program or program[-1][0] != "run" or program[-1][1] != stream or program[-1][3] != self.phase:
            program.append(["run", stream, [], self.phase])
        program[-1][2].append((name, seconds))

    def _grown(self, func: Any) -> None:
        """Memory has grown: note it, and the place where it is a new peak."""
        step, now = self.step, self.storages.now
        step.over_time.append((self.operators, now))
        if now > step.peak.nbytes:
            parts = {k: v for k, v in self.storages.by_part.items() if v}
            step.peak = Peak(now, self.phase, self.running.now(), func._schema.name, here(), parts)
        step.reserved = max(step.reserved, self.storages.allocator.reserved)

    @property
    def stream(self) -> int:
        return self.device.stream if self.device is not None else 0

    # -- what the device's stand-ins report -----------------------------------------------------------

    def sync(self, kind: str) -> None:
        self.step.syncs[kind, here()] += 1
        self.step.program.append(["sync"])

    def wait(self, stream: int, moment: Any) -> None:
        self.step.program.append(["after", stream, *moment])

    def mark(self, stream: int) -> Any:
        return (stream, len(self.step.program))

    def memory(self, what: str) -> int:
        return self.storages.answer(what)

    def pinned(self, tensor: Any) -> None:
        self.host.pin(tensor)

    def locked(self, tensor: Any) -> None:
        """A buffer of the swapping to files: page-locked by the system itself, without the
        allocator's rounding.
        """
        self.host.lock(tensor)

    def disk(self, way: str, nbytes: int) -> None:
        """Bytes have been read from files or written to them."""
        self.step.disk[way] += nbytes

    def used_elsewhere(self, tensor: Any, stream: int) -> None:
        """The model frees such blocks at once; the real allocator waits for the other stream."""


class Told(Listener):
    """Passes what the stand-ins report to the recorder, which exists only once torch is imported."""

    recorder: Recorder | None = None

    def sync(self, kind: str) -> None:
        if self.recorder is not None:
            self.recorder.sync(kind)

    def wait(self, stream: int, moment: Any) -> None:
        if self.recorder is not None:
            self.recorder.wait(stream, moment)

    def mark(self, stream: int) -> Any:
        return self.recorder.mark(stream) if self.recorder is not None else (stream, 0)

    def memory(self, what: str) -> int:
        return self.recorder.memory(what) if self.recorder is not None else 0

    def pinned(self, tensor: Any) -> None:
        if self.recorder is not None:
            self.recorder.pinned(tensor)
