"""Stand-ins for what megatron-core hard-codes to CUDA; installed only where CUDA is absent."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

_FACTORIES = ("zeros", "ones", "empty", "tensor", "full", "arange")


class _TorchOnCpu(ModuleType):
    """torch as one module sees it, with device="cuda" in factory calls meaning the CPU.

    A namespace swapped in once costs nothing per operation; a TorchFunctionMode costs every one.
    """

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return call


@functools.cache
def install() -> bool:
    """Let megatron-core run on the CPU; True when stand-ins are in place, False when CUDA is there."""
    if torch.cuda.is_available():
        return False
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda *_, **__: None
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.nvtx.range_push = lambda *_, **__: None
    cuda.nvtx.range_pop = lambda *_, **__: None
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self

    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random

    schedules.torch = _TorchOnCpu()  # type: ignore[attr-defined]
    state: Any = parallel_state
    state.create_group = _shared_groups(state.create_group)
    stand_in: Any = random
    stand_in._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    stand_in._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    return True


def _shared_groups(create: Any) -> Any:
    """One gloo group for all of megatron-core's groups of the same ranks.

    It makes about 25, most of them equal, and a gloo group is a socket per peer and a thread that
    wakes a hundred times a second. All ranks ask in the same order, so all share alike.
    """
    made: dict[Any, Any] = {}

    @functools.wraps(create)
    def shared(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        world = dist.group.WORLD
        if made.get("world") is not world:
            made.clear()
            made["world"] = world
        key = tuple(ranks) if ranks is not None else None
        if key not in made:
            made[key] = create(ranks, *args, **kwargs)
        return made[key]

    return shared
