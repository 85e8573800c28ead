"""Process groups: megatron-core makes them, the adapter shows them to DeepSpeed as its mpu."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as state
from megatron.core import tensor_parallel

from toolkit.parallel.layout import Coordinates, Layout


def initialise(layout: Layout) -> None:
    """Create megatron-core's process groups for a layout, in the place of an earlier run's;
    torch.distributed must be up.
    """
    if state.model_parallel_is_initialized():
        state.destroy_model_parallel()
    state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        create_gloo_process_groups=False,  # a second set of groups, which only megatron-core's own checkpoints use
    )


def seed_generators(at: Coordinates, *, seed: int) -> None:
    """Seed what dropout draws from: stages, data- and context-parallel ranks draw differently, and
    megatron-core separates TP ranks.
    """
    rank_seed = seed + 1000 * at.pp + 100_003 * at.dp + 10_000_019 * at.cp
    tensor_parallel.model_parallel_cuda_manual_seed(rank_seed)
    torch.manual_seed(rank_seed)


class Mpu:
    """megatron-core's parallel_state, and the calls that DeepSpeed expects of an mpu and
    parallel_state lacks.

    It must not offer initialize_sequence_parallel: DeepSpeed takes that for Ulysses.
    alone: show DeepSpeed a data-parallel group of one, so that it cuts nothing (ZeRO-0).
    """

    def __init__(self, *, alone: bool = False) -> None:
        # only this rank takes part, so nobody else need be asked
        self.single = dist.new_group([dist.get_rank()], use_local_synchronization=True) if alone else None

    def __getattr__(self, name: str) -> Any:
        if name == "initialize_sequence_parallel":
            raise AttributeError(name)
        return getattr(state, name)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(state.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        """Rank within TP × PP; DeepSpeed names checkpoint files with it."""
        return dist.get_rank(state.get_model_parallel_group())

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        # gradients are averaged over context-parallel ranks too
        return self.single or state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_data_parallel_group())

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.get_data_parallel_group())
