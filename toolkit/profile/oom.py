"""When memory ends, in a profile or in a run: what asked for it, on which rank, and the nearest
change that fits.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from toolkit.config.schema import RunConfig
from toolkit.cost.workload import Workload
from toolkit.errors import OutOfMemory
from toolkit.parallel.case import Machine
from toolkit.parallel.layout import Layout
from toolkit.plan.remedy import nearest_fit
from toolkit.profile import predict
from toolkit.train.memory import is_out_of_memory

GIB = 2**30
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMGT]iB)?", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


# what a run is doing, by the function that it is in: the first that is on the stack
DOING = {
    "_build": "parameters and optimizer states",
    "evaluate": "an evaluation",
    "save": "a save",
    "finish": "the update",
    "_step": "activations and gradients",
}


class Place:
    """What a rank is doing now, kept up to date by hooks, so that an error can say it."""

    def __init__(self, config: RunConfig, layout: Layout, rank: int, *, limit_gib: float | None) -> None:
        self.config, self.layout, self.rank, self.limit_gib = config, layout, rank, limit_gib
        self.part = "parameters and optimizer states"
        self.layer: int | None = None

    def follow(self, engine: Any) -> None:
        """Watch an engine's layers and steps from here on."""
        self.part = "activations"
        for chunk in engine.chunks:
            chunk.register_forward_pre_hook(lambda *_: self._at("activations", None))
            for layer in chunk.decoder.layers:
                number = int(layer.layer_number)
                layer.register_forward_pre_hook(lambda *_, number=number: self._at("activations", number))
                layer.register_forward_hook(lambda _module, _inputs, output, number=number: self._watch(output, number))
            if chunk.post_process:
                chunk.output_layer.register_forward_pre_hook(lambda *_: self._at("logits", None))
        finish = engine.finish

        def finishing() -> Any:
            self._at("optimizer states and the update", None)
            result = finish()
            self._at("activations", None)
            return result

        engine.finish = finishing

    def _watch(self, output: Any, number: int) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: self._at("gradients in backward", number))

    def _at(self, part: str, layer: int | None) -> None:
        self.part, self.layer = part, layer

    def error(self, cause: BaseException) -> OutOfMemory:
        """The message for a user."""
        return _error(self.config, self.layout, self.rank, self.part, cause, layer=self.layer, limit_gib=self.limit_gib)


def in_training(config: RunConfig, layout: Layout, rank: int, cause: BaseException) -> OutOfMemory:
    """The message for a user whose run has met the end of memory, with the parts of the estimate."""
    on_stack = {frame.f_code.co_name for frame, _ in traceback.walk_tb(cause.__traceback__)}
    part = next((text for name, text in DOING.items() if name in on_stack), "training")
    return _error(config, layout, rank, part, cause, parts=True)


def _error(
    config: RunConfig,
    layout: Layout,
    rank: int,
    part: str,
    cause: BaseException,
    *,
    layer: int | None = None,
    limit_gib: float | None = None,
    parts: bool = False,
) -> OutOfMemory:
    at = layout.coordinates(rank)
    where = f"rank {rank} (stage {at.pp}" + (f", layer {layer}" if layer else "") + ")"
    asked = _ASKED.search(str(cause))
    size = float(asked[1]) * _UNITS[(asked[2] or "bytes").lower()] if asked else None
    wanted = f" asking for {_size(size)}" if size else ""
    cuda = torch.cuda.is_available()
    memory = limit_gib or (torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().total) / GIB
    ranks_here = 1 if cuda or limit_gib else layout.world_size
    hardware = predict.hardware_here(
        gpu=torch.cuda.get_device_name() if cuda else None, ranks=layout.world_size, memory_gib=memory / ranks_here
    )
    limit = f"{memory / ranks_here:.2f} GiB" + (" of --memory-limit" if limit_gib else " a rank")
    fix = nearest_fit(config, layout.world_size, hardware, machine=Machine(cuda=cuda), ran_out=True)
    estimate = predict.memory(Workload.of(config, layout.world_size), hardware, at.pp)
    held = " (" + ", ".join(f"{name} {_size(nbytes)}" for name, nbytes in estimate.items() if name != "peak" and nbytes) + ")"
    return OutOfMemory(
        f"{where} ran out of memory for {part}{wanted}",
        why=f"it takes about {_size(estimate['peak'])} at its peak{held if parts else ''}, of {limit}",
        fix=fix,
    )


def _size(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= 0.1 * GIB else f"{nbytes / 2**20:.1f} MiB"


@contextmanager
def fences(place: Place) -> Iterator[None]:
    """Turn every way in which PyTorch says that memory has ended into OutOfMemory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise place.error(error) from None
