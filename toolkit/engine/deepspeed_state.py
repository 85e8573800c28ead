"""What DeepSpeed's ZeRO optimizers hold, under names of our own: with zero.py the only code that
knows their private attributes.

state = DeepSpeedState(engine)
for i in range(len(state)):
    swapped = state.swap_in(i)
    print(state.master(i), state.states(i), state.places(i))
    state.swap_out(i, changed=False, swapped=swapped)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


class Place(NamedTuple):
    """partition[at : at + numel] is parameter.flatten()[start : start + numel]."""

    parameter: Any
    start: int
    at: int
    numel: int


def full_shape(parameter: Any) -> list[int]:
    """Shape of this rank's part of a weight, also where ZeRO-3 keeps only a piece of it in memory."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


class DeepSpeedState:
    """The flat partitions of an engine's optimizer, one for each optimizer group (ZeRO-3: for each
    sub-group).
    """

    def __init__(self, engine: Any) -> None:
        self.engine: Any = engine.engine
        self.zero: Any = engine.optimizer
        self.sharded: bool = engine.stage == 3

    def __len__(self) -> int:
        return len(self._masters)

    def master(self, i: int) -> Tensor:
        """The flat fp32 weights that the optimizer updates."""
        master: Tensor = self._masters[i]
        return master

    def states(self, i: int) -> dict[str, Any]:
        """The optimizer's states of a partition by its own names: empty before the first step."""
        states: dict[str, Any] = self._inner(i).state[self.master(i)]  # a defaultdict
        return states

    def param_group(self, i: int) -> dict[str, Any]:
        """The settings that a partition is updated with."""
        group: dict[str, Any] = self._inner(i).param_groups[self.zero.sub_group_to_group_id[i] if self.sharded else i]
        return group

    def counts_in_python(self, i: int) -> bool:
        """Whether the step count is a Python integer (DeepSpeed's Adam for the CPU) instead of a
        tensor (torch).
        """
        return hasattr(self._inner(i), "ds_opt_adam")

    def places(self, i: int) -> list[Place]:
        """What lies in this rank's partition, in its order."""
        found, at = [], 0
        if self.sharded:
            rank = dist.get_rank(self.zero.dp_process_group)
            for p in self.zero.fp16_groups[i]:
                size = p.partition_numel()
                start = rank * size
                count = max(0, min(size, p.ds_numel - start))
                if count:
                    found.append(Place(p, start, at, count))
                at += size
            return found
        size, start = self.master(i).numel(), self.partition_start(i)
        for p, offset in self.offsets(i):
            first = offset - start
            low, high = max(0, first), min(size, first + p.numel())
            if low < high:
                found.append(Place(p, low - first, low, high - low))
        return found

    def members(self, i: int) -> list[Any]:
        """The weights that data-parallel ranks share out in a partition, whether or not this rank
        has a piece of them.
        """
        return list(self.zero.fp16_groups[i] if self.sharded else self.zero.bit16_groups[i])

    def offsets(self, i: int) -> list[tuple[Any, int]]:
        """Below ZeRO-3: a group's weights and where each starts in the flat tensor that
        data-parallel ranks share out.
        """
        flat = self.zero.bit16_groups_flat[i]
        return [(p, p.storage_offset() - flat.storage_offset()) for p in self.zero.bit16_groups[i]]

    def partition_start(self, i: int) -> int:
        """Below ZeRO-3: where this rank's partition starts in that flat tensor."""
        return dist.get_rank(self.zero.dp_process_group) * self.master(i).numel()

    def swap_in(self, i: int) -> bool:
        """Bring a partition from disk where it lives there; returns whether it does."""
        if not (self.sharded and self.zero._swappable_optimizer_subgroup(i)):
            return False
        self.zero._optimizer_states_and_gradient_swap_in(i)
        return True

    def swap_out(self, i: int, *, changed: bool, swapped: bool) -> None:
        """Be done with a partition; changed: its weights go to where the forward pass reads them."""
        if changed and self.sharded:
            self.zero._reassign_or_swap_out_partitioned_parameters(i)
        if swapped:
            # written back even if unchanged: DeepSpeed frees its buffers in no other way
            self.zero._optimizer_states_and_gradient_swap_out(i)

    def before_set(self) -> None:
        """Call before partitions are given other values."""
        if self.sharded:
            self.zero.checkpoint_event_prologue()

    def after_set(self) -> None:
        """Bring the weights used in forward in line with the masters; every rank calls it."""
        if self.sharded:
            self.zero.checkpoint_event_epilogue()
        else:
            self.zero.update_lp_params()

    @property
    def counters(self) -> dict[str, int]:
        """How many steps and samples the engine has seen."""
        return {k: getattr(self.engine, k) for k in _COUNTERS}

    def set_counters(self, counters: Mapping[str, float]) -> None:
        """Put back what counters returned."""
        for k, v in counters.items():
            setattr(self.engine, k, v)

    @property
    def loss_scaler(self) -> Any:
        """The object that holds fp16's loss scale."""
        return self.zero.loss_scaler

    @property
    def _masters(self) -> Any:
        return self.zero.fp32_partitioned_groups_flat if self.sharded else self.zero.single_partition_of_fp32_groups

    def _inner(self, i: int) -> Any:
        """The optimizer that updates a partition: with a ratio below 1 some sub-groups stay on the device."""
        on_device = self.sharded and self.zero.offload_optimizer and self.zero.subgroup_to_device[i] != "cpu"
        return self.zero.backup_optimizer if on_device else self.zero.optimizer


# -- what is in memory ----------------------------------------------------------------------------------


def held_tensors(engine: Any) -> dict[str, list[Tensor]]:
    """An engine's tensors by what they are for; "zero buffers" lists every tensor of DeepSpeed's
    optimizer, the other parts' too.
    """
    zero = engine.optimizer
    weights = [p for chunk in engine.chunks for p in chunk.parameters()]
    parameters: list[Tensor] = []
    for p in weights:
        for owner in (p, getattr(p, "ds_tensor", None), getattr(p, "ds_secondary_tensor", None)):
            if isinstance(owner, Tensor):
                parameters.append(owner.detach())
    parameters += tensors_in([getattr(zero, name, None) for name in ("bit16_groups_flat", "fp16_partitioned_groups_flat")])
    gradients = [flat.buffer for flat in engine.flat] + [p.grad for p in weights if p.grad is not None]
    for name, value in vars(zero).items():
        if name.endswith("param_id_to_grad_partition") or name in (
            "averaged_gradients",
            "all_grad_tensors",
            "grad_partitions_flat_buffer",
            "accumulated_grads_in_cpu",
        ):
            gradients += tensors_in(value)
    masters = tensors_in([getattr(zero, n, None) for n in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")])
    gradients += [m.grad for m in masters if m.grad is not None]
    states = tensors_in([dict(inner.state) for inner in (zero.optimizer, getattr(zero, "backup_optimizer", None)) if inner is not None])
    return {"parameters": parameters, "gradients": gradients, "optimizer": masters + states, "zero buffers": tensors_in(vars(zero))}


def bucket_tensors(engine: Any) -> list[Tensor]:
    """The buckets that DeepSpeed fills during a backward and frees at its end."""
    return tensors_in([bucket.buffer for bucket in getattr(engine.optimizer, "ipg_buckets", {}).values()])


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor reachable through containers and DeepSpeed's own objects."""
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting: list[Any] = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        elif type(item).__module__.startswith("deepspeed.runtime") and hasattr(item, "__dict__") and not isinstance(item, torch.nn.Module):
            waiting += vars(item).values()
    return found
