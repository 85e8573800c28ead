"""What a rank does, written down as it does it: storages, kernels, messages, waits and host synchronisations, with their places.

A TorchDispatchMode sees every operator; the methods of torch's ProcessGroup see every message. It works on tensors without data
(a rehearsal) and on real ones (the run that a rehearsal is held to).
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.profile.clock import COLLECTIVES, plain_name
from toolkit.rehearse.allocator import CachingAllocator
from toolkit.rehearse.device import Listener
from toolkit.rehearse.price import Price, names_of

SAVED = ("activations", "logits")
_SKIPPED = (
    "/torch/",
    "/toolkit/rehearse/",
    "/toolkit/gpu_check/",
    "/warnings.py",
    "/deepspeed/comm/",
    "/deepspeed/utils/",
    "contextlib.py",
    "typing_extensions.py",
    "/toolkit/engine/schedule.py",
)
_VIEWS = {"_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "detach_", "set_", "resize_"}
_NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "device", "is_pinned", "sym_size", "sym_numel"}


@dataclass
class Message:
    """One collective, send or receive as a rank issues it. group: its number in the record; nbytes: of what COLLECTIVES names.

    batch: number of the batch_isend_irecv it belongs to, None outside of one. peer: a send's or receive's other rank, a broadcast's root.
    """

    operation: str
    group: int
    nbytes: int
    dtype: str
    peer: int | None
    batch: int | None
    waits: bool
    seconds: float
    place: str


@dataclass
class Peak:
    """The largest moment of memory: bytes, what was running, and every part's bytes then."""

    nbytes: int = 0
    phase: str = ""
    module: str = ""
    operator: str = ""
    place: str = ""
    parts: dict[str, int] = field(default_factory=dict)


@dataclass
class Step:
    """What one optimizer step did. program: kernels by stream, messages, waits and synchronisations in the order issued."""

    peak: Peak = field(default_factory=Peak)
    reserved: int = 0
    messages: list[Message] = field(default_factory=list)
    program: list[list[Any]] = field(default_factory=list)
    syncs: Counter[tuple[str, str]] = field(default_factory=Counter)
    elsewhere: Counter[tuple[str, str]] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    over_time: list[tuple[int, int]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values; counters become rows of [what, place, count]."""
        return {
            "peak": asdict(self.peak),
            "reserved": self.reserved,
            "messages": [list(asdict(m).values()) for m in self.messages],
            "program": self.program,
            "syncs": [[*key, n] for key, n in self.syncs.most_common()],
            "elsewhere": [[*key, n] for key, n in self.elsewhere.most_common()],
            "kernels": dict(self.kernels),
            "over_time": thin(self.over_time),
        }


def thin(samples: list[tuple[int, int]], *, most: int = 400) -> list[tuple[int, int]]:
    """At most about `most` of (number of the operator, bytes): the largest of each stretch."""
    size = max(1, -(-len(samples) // most))
    return [max(samples[i : i + size], key=lambda s: s[1]) for i in range(0, len(samples), size)]


class Recorder(TorchDispatchMode):
    """Active from before the model is built, so that the allocator sees all. kind: the device type that counts."""

    def __init__(self, kind: str, *, price: Price | None = None, capacity: int | None = None, rank: int = 0) -> None:
        super().__init__()
        self.kind, self.price, self.rank = kind, price, rank
        self.step = Step()
        self.allocator = CachingAllocator(capacity=capacity)
        self.sizes: dict[int, int] = {}
        self.part: dict[int, str] = {}
        self.by_part: Counter[str] = Counter()
        self.now = 0
        self.phase, self.module = "building", ""
        self.operators = 0
        self.groups: dict[tuple[int, ...], int] = {}
        self.device: Any = None  # toolkit.rehearse.device.Device, whose current stream operators go to
        self._batch: int | None = None
        self._batches = 0
        self._inside = False
        self._kinds: dict[Any, str] = {}
        self._works: dict[int, int] = {}
        self.keeps_going: Callable[[str], None] | None = None

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
        for tensor in _tensors(result):
            self._see(tensor, func)
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
        if _on(tensor) == "cuda":
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
        outputs = _tensors(result)
        if outputs and outputs[0].dtype == torch.bool and outputs[0].dim() == 0:
            outputs[0]._rehearsed_by = name  # type: ignore[attr-defined]
        inputs = [t for value in (*args, *kwargs.values()) for t in _tensors(value)]
        places = {_on(t) for t in (*inputs, *outputs)}
        if self.kind not in places:
            # pinned batches and generators' states are on the host on purpose
            if self.kind == "cuda" and any(t.numel() > 16 for t in outputs):
                self.step.elsewhere[name, here()] += 1
            return
        if kind == "copy" and len(places) > 1:
            big = max((t.numel() * t.element_size() for t in (*inputs, *outputs)), default=0)
            # a copy out of the device always waits unless it is told not to; one into it waits for memory that is not pinned
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

    @property
    def stream(self) -> int:
        return self.device.stream if self.device is not None else 0

    # -- memory -------------------------------------------------------------------------------------

    def _see(self, tensor: Tensor, func: Any) -> None:
        if _on(tensor) != self.kind or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        address, nbytes = storage._cdata, storage.nbytes()
        if not nbytes or address in self.sizes:
            return
        self.sizes[address] = nbytes
        self.part[address] = "working set"
        self.by_part["working set"] += nbytes
        self.now += nbytes
        self.allocator.allocate(address, nbytes, stream=self.stream)
        weakref.finalize(storage, self._end, address).atexit = False
        self.step.over_time.append((self.operators, self.now))
        if self.now > self.step.peak.nbytes:
            parts = {k: v for k, v in self.by_part.items() if v}
            self.step.peak = Peak(self.now, self.phase, self._module_now(), func._schema.name, here(), parts)
        self.step.reserved = max(self.step.reserved, self.allocator.reserved)

    def _end(self, address: int) -> None:
        nbytes = self.sizes.pop(address, 0)
        if nbytes:
            self.now -= nbytes
            self.by_part[self.part.pop(address)] -= nbytes
            self.allocator.free(address)

    def assign(self, part: str, tensors: Any) -> None:
        """Count the storages of tensors for a part from now on."""
        for tensor in tensors:
            if tensor.device.type == self.kind and tensor.layout == torch.strided:
                self.move(tensor.untyped_storage()._cdata, part)

    def move(self, address: int, part: str) -> None:
        """Count one storage for a part."""
        before = self.part.get(address)
        if before is not None and before != part:
            self.by_part[before] -= self.sizes[address]
            self.by_part[part] += self.sizes[address]
            self.part[address] = part

    def _module_now(self) -> str:
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        if node is not None:
            self.module = cast(Any, node).metadata.get("module", self.module)
        return self.module

    @contextmanager
    def modules(self, chunks: Any) -> Iterator[None]:
        """Know which module is running, in forward by its call and in backward by the autograd node that its forward made."""
        stack: list[str] = []
        handles = []

        def enter(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                stack.append(name)
                self.module = name

            return hook

        def leave(_module: Any, _inputs: Any, outputs: Any) -> None:
            name = stack.pop() if stack else ""
            for tensor in _tensors(outputs):
                if tensor.grad_fn is not None:
                    cast(Any, tensor.grad_fn).metadata.setdefault("module", name)
            self.module = stack[-1] if stack else name

        for chunk in chunks:
            for name, module in chunk.named_modules():
                handles.append(module.register_forward_pre_hook(enter(name or "model")))
                handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- messages -----------------------------------------------------------------------------------

    @contextmanager
    def messages(self) -> Iterator[None]:
        """Write down what goes through torch's process groups within this context."""
        group_class, work_class, anything = dist.ProcessGroup, dist.Work, cast(Any, dist)
        before = {name: vars(group_class)[name] for name in COLLECTIVES if name in vars(group_class)}
        kept = {name: getattr(group_class, name) for name in before}
        wait_before, wait = vars(work_class)["wait"], work_class.wait
        batched = anything.batch_isend_irecv

        def counted(name: str) -> Callable[..., Any]:
            call, place = kept[name], COLLECTIVES[name]

            def method(group: Any, *args: Any, **kwargs: Any) -> Any:
                if self._inside or group.size() == 1:
                    return call(group, *args, **kwargs)
                number = self._message(group, name, place, args)
                self._inside = True
                try:
                    work = call(group, *args, **kwargs)
                finally:
                    self._inside = False
                if work is not None:
                    self._works[id(work)] = number
                return work

            return method

        def waited(work: Any, *args: Any, **kwargs: Any) -> Any:
            number = self._works.pop(id(work), None)
            if number is not None and number < len(self.step.messages):
                self.step.program.append(["wait", self.stream, number])
            return wait(work, *args, **kwargs)

        def batch(operations: Any) -> Any:
            self._batch, self._batches = self._batches, self._batches + 1
            try:
                return batched(operations)
            finally:
                self._batch = None

        try:
            for name in kept:
                setattr(group_class, name, counted(name))
            work_class.wait = waited  # type: ignore
            anything.batch_isend_irecv = batch
            yield
        finally:
            for name, method in before.items():
                setattr(group_class, name, method)
            work_class.wait = wait_before  # type: ignore
            anything.batch_isend_irecv = batched

    def _message(self, group: Any, name: str, place: int, args: Any) -> int:
        ranks = tuple(dist.get_process_group_ranks(group))
        tensors = _tensors(args[place]) if len(args) > place else []
        peer = None
        if name in ("send", "recv"):
            peer = ranks[args[1]]
        elif name == "broadcast" and len(args) > 1:
            peer = ranks[args[1].rootRank]
        nbytes = sum(t.numel() * t.element_size() for t in tensors)
        operation = plain_name(name)
        other = peer if name in ("send", "recv") else None
        seconds = self.price.message(operation, ranks, nbytes, peer=other, rank=self.rank) if self.price else 0.0
        number = len(self.step.messages)
        dtype = names_of(tensors[0].dtype) if tensors else ""
        # torch itself makes the current stream wait where a collective is not asked for as asynchronous
        waits = not bool(getattr(args[-1], "asyncOp", True)) if args else False
        message = Message(
            operation, self.groups.setdefault(ranks, len(self.groups)), nbytes, dtype, peer, self._batch, waits, seconds, here()
        )
        self.step.messages.append(message)
        self.step.program.append(["message", self.stream, number])
        return number

    # -- what the device's stand-ins report -----------------------------------------------------------

    def sync(self, kind: str) -> None:
        self.step.syncs[kind, here()] += 1
        self.step.program.append(["sync"])

    def wait(self, stream: int, moment: Any) -> None:
        self.step.program.append(["after", stream, *moment])

    def mark(self, stream: int) -> Any:
        return (stream, len(self.step.program))

    def memory(self, what: str) -> int:
        a = self.allocator
        if what == "empty_cache":
            a.empty_cache()
        elif what.startswith("reset"):
            a.reset_peaks()
        answers = {
            "allocated": a.allocated,
            "reserved": a.reserved,
            "peak allocated": a.peak_allocated,
            "peak reserved": a.peak_reserved,
        }
        return answers.get(what, 0)

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


def _on(tensor: Any) -> str:
    return str((tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device).type)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _tensors(item)]
    return []


def here() -> str:
    """The innermost line of the program itself: file, line and function, past torch's own and the recorder's."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not any(part in name for part in _SKIPPED) and not name.startswith("<"):
            path = Path(name)
            return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
