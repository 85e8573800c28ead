"""Which module is running: in forward by its call, in backward by the autograd node that its forward made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from toolkit.rehearse.place import tensors_of


class Modules:
    """Follows the modules of a stage's chunks."""

    def __init__(self) -> None:
        self.module = ""

    def now(self) -> str:
        """The name of the module that runs, or ran last."""
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        if node is not None:
            self.module = cast(Any, node).metadata.get("module", self.module)
        return self.module

    @contextmanager
    def followed(self, chunks: Any) -> Iterator[None]:
        """Keep now() up to date within this context."""
        stack: list[str] = []
        handles = []

        def enter(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                stack.append(name)
                self.module = name

            return hook

        def leave(_module: Any, _inputs: Any, outputs: Any) -> None:
            name = stack.pop() if stack else ""
            for tensor in tensors_of(outputs):
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
