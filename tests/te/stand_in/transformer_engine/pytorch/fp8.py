"""The switch of FP8, which is off."""

from __future__ import annotations

import contextlib
from typing import Any


class FP8GlobalStateManager:
    """What asks whether FP8 is on hears no."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def fp8_autocast(enabled: bool = False, **_: Any) -> Any:
    """A context without FP8."""
    if enabled:
        raise NotImplementedError("the stand-in of Transformer Engine has no FP8")
    return contextlib.nullcontext()
