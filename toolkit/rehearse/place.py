"""Places in the code, and what a call was given: small helpers of those who write a rank's step down."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_SKIPPED = (
    "/torch/",
    "/toolkit/rehearse/",
    "/toolkit/gpu_check/",
    "/warnings.py",
    "/deepspeed/comm/",
    "/deepspeed/utils/",
    "/deepspeed/accelerator/",
    "contextlib.py",
    "typing_extensions.py",
    "/toolkit/engine/schedule.py",
)


def device_of(tensor: Any) -> str:
    """The device type that a tensor is on, or plays to be on."""
    return str((tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device).type)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of nested lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_of(item)]
    return []


def here() -> str:
    """The innermost line of the program itself: file, line and function, past torch's own and the
    recorder's.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not any(part in name for part in _SKIPPED) and not name.startswith("<"):
            path = Path(name)
            return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
