"""Train GPT and Llama on megatron-core layers with DeepSpeed ZeRO, in any layout, with the same result.

The Python API is in docs/api.md. Its names are loaded when they are first asked for:
`import toolkit` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from toolkit.config.schema import RunConfig as Config
    from toolkit.engine.loss import cross_entropy, label_logits, log_sum_exp
    from toolkit.errors import ToolkitError
    from toolkit.plan.ask import estimate, tune
    from toolkit.trainer import Trainer

__all__ = ["Config", "ToolkitError", "Trainer", "cross_entropy", "estimate", "label_logits", "log_sum_exp", "tune"]

_HOMES = {
    "Config": ("toolkit.config.schema", "RunConfig"),
    "ToolkitError": ("toolkit.errors", "ToolkitError"),
    "Trainer": ("toolkit.trainer", "Trainer"),
    "cross_entropy": ("toolkit.engine.loss", "cross_entropy"),
    "estimate": ("toolkit.plan.ask", "estimate"),
    "label_logits": ("toolkit.engine.loss", "label_logits"),
    "log_sum_exp": ("toolkit.engine.loss", "log_sum_exp"),
    "tune": ("toolkit.plan.ask", "tune"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    globals()[name] = found = getattr(importlib.import_module(module), attribute)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
