"""A FakeTensorMode that answers again quickly: a rehearsal asks for the same operators on the same
shapes thousands of times.

A view is made on the meta device at once. Any other operator goes through PyTorch's own rules the
first time; its outputs' shapes are remembered by everything that they can depend on. Imported only
where torch is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_SLOW = object()  # an operator or a call that PyTorch's own rules must see each time
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class ShapeMode(FakeTensorMode):
    """As FakeTensorMode, with answers remembered."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._answers: dict[Any, Any] = {}
        self._kinds: dict[Any, Any] = {}
        self._fields: dict[torch.device, dict[str, Any]] = {}
        pointers: Any = torch._C
        # what a read of the address does; DeepSpeed asks whether it is aligned
        self._guard = (
            pointers._set_warn_deprecated_on_mutable_data_ptr
            if self._allow_unsafe_data_ptr_access
            else pointers._set_throw_on_mutable_data_ptr
        )

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and the wrapper against it costs as much as a view

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        if kind == "view":
            source = args[0]
            if type(source) is FakeTensor and source.constant is None and not kwargs:
                with in_kernel_invocation_manager(self):
                    made = func(*args)
                device = source.fake_device
                return self._wrap(made, device) if isinstance(made, Tensor) else [self._wrap(m, device) for m in made]
        elif kind == "plain":
            key = _key(func, args, kwargs)
            if key is not None:
                return self._remembered(key, func, types, args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    def _remembered(self, key: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        answer = self._answers.get(key)
        if answer is None or answer is _SLOW:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if answer is None:
                self._answers[key] = _description(result, args)
            return result
        several, outputs = answer
        made = [self._make(args, *output) for output in outputs]
        return several(made) if several is not None else made[0]

    def _make(self, args: Any, place: int | None, shape: Any, stride: Any, dtype: Any, device: Any) -> Any:
        if place is not None:
            return args[place]
        with in_kernel_invocation_manager(self):
            bare = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return self._wrap(bare, device)

    def _wrap(self, bare: Tensor, device: torch.device) -> FakeTensor:
        """As FakeTensor's constructor; its fields are copied from the first one that it made."""
        fields = self._fields.get(device)
        if fields is None:
            fields = self._fields[device] = dict(FakeTensor(self, bare, device).__dict__)
        made = Tensor._make_subclass(FakeTensor, bare, False, dispatch_device=True, device_for_backend_keys=device)  # type: ignore[attr-defined]
        self._guard(made)
        made.__dict__.update(fields)
        return made


def _kind(func: Any) -> Any:
    """view: an alias of the first argument; plain: outputs depend on shapes and plain values alone;
    _SLOW: neither is certain.
    """
    if func.namespace != "aten" or not isinstance(func, torch._ops.OpOverload):
        return _SLOW
    tags = func.tags
    if torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags or torch.Tag.inplace_view in tags:
        return _SLOW
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd)
    name = func._schema.name.split("::")[-1]
    if composite or name.startswith(("lift", "_local_scalar", "set_", "resize", "_unsafe_view")):
        return _SLOW
    if func.is_view:
        return "view"
    return "plain" if all("Tensor" in str(r.type) for r in func._schema.returns) else _SLOW


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    """All that the outputs' shapes depend on; None where that cannot be said."""
    found: list[Any] = [func]
    if not _describe(args, found):
        return None
    if kwargs:
        for name, value in kwargs.items():
            found.append(name)
            if not _describe((value,), found):
                return None
    return tuple(found)


def _describe(values: Any, found: list[Any]) -> bool:
    for value in values:
        if type(value) is FakeTensor:
            if value.constant is not None:
                return False
            found.append((value.shape, value.stride(), value.dtype, value.fake_device))
        elif isinstance(value, (list, tuple)):
            found.append(len(value))
            if not _describe(value, found):
                return False
        elif isinstance(value, _PLAIN):
            found.append((type(value), value))
        else:
            return False
    return True


def _description(result: Any, args: Any) -> Any:
    """How to make a result again: for each tensor the argument that it is, or shape, stride, type
    and device; else _SLOW.
    """
    own = {id(a): i for i, a in enumerate(args) if isinstance(a, FakeTensor)}
    inside = {t.untyped_storage()._cdata for t in _fakes(args)}
    results = result if isinstance(result, (list, tuple)) else [result]
    outputs: list[Any] = []
    for out in results:
        if id(out) in own:
            outputs.append((own[id(out)], None, None, None, None))
            continue
        if type(out) is not FakeTensor or out.constant is not None or out.layout != torch.strided:
            return _SLOW
        if out.untyped_storage()._cdata in inside or out.storage_offset() or out.requires_grad:
            return _SLOW
        if torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta").untyped_storage().nbytes() != (
            out.untyped_storage().nbytes()
        ):
            return _SLOW
        outputs.append((None, out.shape, out.stride(), out.dtype, out.fake_device))
    several = list if isinstance(result, list) else tuple if isinstance(result, tuple) else None
    return several, outputs


def _fakes(values: Any) -> list[FakeTensor]:
    found: list[FakeTensor] = []
    for value in values:
        if isinstance(value, FakeTensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _fakes(value)
    return found
