"""What the stand-in's modules with parameters have in common: when values and attributes are set."""

from __future__ import annotations

from typing import Any

import torch


class Module(torch.nn.Module):
    """Parameters get their initial values and attributes when they are made, or not at all on the
    meta device.

    Transformer Engine leaves both to a reset_parameters() that whoever gives such parameters memory
    may call. Who never does, as this project, must know by itself which gradients sequence
    parallelism makes partial.
    """

    sequence_parallel: bool | None

    def own(self, name: str, shape: tuple[int, ...], *, value: Any, device: Any, dtype: torch.dtype | None, whole: bool) -> None:
        """Register a parameter. value: a number or a function that fills it; whole: every
        tensor-parallel rank has all of it.
        """
        tensor = torch.empty(shape, device=device, dtype=dtype)
        deferred = device == "meta"
        if tensor.device.type == "meta" and not deferred:
            tensor = torch.empty_like(tensor, device=device)  # as Transformer Engine does with what it is to fill
        parameter = torch.nn.Parameter(tensor)
        self.register_parameter(name, parameter)
        if deferred:
            return
        with torch.no_grad():
            if callable(value):
                value(parameter)
            else:
                parameter.fill_(value)
        if whole and self.sequence_parallel is not None:
            parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        elif not whole:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
