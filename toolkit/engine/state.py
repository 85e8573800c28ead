"""What an engine holds that a resumed run needs: flat partitions of weights and moments, counters, random generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from toolkit.engine.partitions import Fragment
from toolkit.model.init import named_weights

MASTER = "master"
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True)
class Partition:
    """One optimizer group of this rank (ZeRO-3: sub-group). tensors: "master" (fp32, flat) and the optimizer's states by its own names."""

    tensors: dict[str, Tensor]
    numbers: dict[str, float]
    fragments: list[Fragment]


class EngineState:
    """Reads and sets what an engine's optimizer holds, whatever the ZeRO stage and wherever it lives."""

    def __init__(self, engine: Any) -> None:
        config = engine.config
        self.engine = engine
        self.optimizer: Any = engine.optimizer
        self.sharded = engine.stage == 3
        self.swapping = "nvme" in (config.zero.offload_optimizer, config.zero.offload_param)
        """Partitions are read from disk one at a time, and are gone when the next one is."""
        self.names: dict[int, str] = {}
        self.parameters: dict[str, dict[str, Any]] = {}
        for chunk in engine.chunks:
            for weight, p in named_weights(chunk, config.model.spec):
                self.names[id(p)] = weight.name
                shape = list(getattr(p, "ds_shape", p.shape))
                self.parameters[weight.name] = {"shape": shape, "dim": weight.cut.dim, "blocks": weight.cut.blocks}

    def __len__(self) -> int:
        o = self.optimizer
        return len(o.fp32_partitioned_groups_flat if self.sharded else o.single_partition_of_fp32_groups)

    def partitions(self) -> Iterator[Partition]:
        """This rank's partitions in order; the tensors are the live ones, to be read only."""
        for i in range(len(self)):
            swapped = self._swap_in(i)
            master, states = self._master(i), self._states(i)
            tensors = {MASTER: master.detach()} | {k: v.detach() for k, v in states.items() if isinstance(v, Tensor)}
            numbers = {k: v for k, v in states.items() if isinstance(v, (int, float))}
            yield Partition(tensors, numbers, self.fragments(i))
            if swapped:
                # written back unchanged: DeepSpeed frees its buffers in no other way
                self.optimizer._optimizer_states_and_gradient_swap_out(i)

    @torch.no_grad()
    def set(self, index: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Give a partition its values; ValueError where they are of another size."""
        swapped = self._swap_in(index)
        master, states = self._master(index), self._states(index)
        if tensors[MASTER].numel() != master.numel():
            raise ValueError(f"group {index} has {master.numel()} values here and {tensors[MASTER].numel()} there")
        master.data.copy_(tensors[MASTER])
        for key, value in tensors.items():
            if key != MASTER:
                self._set_state(index, states, key, value)
        states.update(numbers)
        self._finish(index, swapped=swapped)

    @torch.no_grad()
    def fill(self, index: int, read: Callable[[Tensor, str, str, int], None], *, keys: Sequence[str], step: int | None) -> None:
        """Give a partition its values fragment by fragment: read(out, name, key, start) fills a flat piece of a live tensor.

        keys: "master", and the optimizer's states to set; step: the updates it has made, for its own count. Padding becomes zero.
        """
        swapped = self._swap_in(index)
        master, states = self._master(index), self._states(index)
        fragments = self.fragments(index)
        for key in keys:
            if key != MASTER and key not in states:
                states[key] = torch.zeros_like(master.data)
            flat = (master if key == MASTER else states[key]).data
            flat.zero_()
            for f in fragments:
                read(flat[f.at : f.at + f.count], f.name, key, f.start)
        if step is not None and hasattr(self._inner(index), "ds_opt_adam"):
            states["step"] = step  # DeepSpeed's own Adam for the CPU counts in Python
        elif step is not None:
            self._set_state(index, states, "step", torch.tensor(float(step)))
        self._finish(index, swapped=swapped)

    def _set_state(self, index: int, states: dict[str, Any], key: str, value: Tensor) -> None:
        if key in states:
            states[key].data.copy_(value)
            return
        # torch keeps the step count of a fused optimizer beside the parameters, any other on the CPU
        group = self._param_group(index)
        with_parameters = value.dim() > 0 or group.get("fused") or group.get("capturable")
        states[key] = value.to(device=self._master(index).device if with_parameters else "cpu", copy=True)

    def _finish(self, index: int, *, swapped: bool) -> None:
        if self.sharded:
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if swapped:
            self.optimizer._optimizer_states_and_gradient_swap_out(index)

    def fragments(self, i: int) -> list[Fragment]:
        """Which elements of which parameters a partition holds, in its order."""
        o = self.optimizer
        rank = dist.get_rank(o.dp_process_group)
        found, at = [], 0
        if self.sharded:
            for p in o.fp16_groups[i]:
                size = p.partition_numel()
                start = rank * size
                count = max(0, min(size, p.ds_numel - start))
                if count:
                    found.append(Fragment(self.names[id(p)], start, at, count))
                at += size
            return found
        flat, size = o.bit16_groups_flat[i], self._master(i).numel()
        for p in o.bit16_groups[i]:
            first = p.storage_offset() - flat.storage_offset() - rank * size
            low, high = max(0, first), min(size, first + p.numel())
            if low < high:
                found.append(Fragment(self.names[id(p)], low - first, low, high - low))
        return found

    def before_set(self) -> None:
        """Call before the first set()."""
        if self.sharded:
            self.optimizer.checkpoint_event_prologue()

    def after_set(self) -> None:
        """Bring the weights used in forward in line with the masters; every rank calls it after its last set()."""
        if self.sharded:
            self.optimizer.checkpoint_event_epilogue()
        else:
            self.optimizer.update_lp_params()

    # -- the rest -----------------------------------------------------------------------------------

    def numbers(self) -> dict[str, dict[str, float]]:
        """Step counters of the engine and the state of fp16's loss scaler."""
        scaler = {k: v for k, v in vars(self.optimizer.loss_scaler).items() if isinstance(v, (int, float))}
        return {"counters": {k: getattr(self.engine.engine, k) for k in _COUNTERS}, "loss_scaler": scaler}

    def set_numbers(self, numbers: Mapping[str, Mapping[str, float]], *, same_precision: bool = True) -> None:
        """Put back what numbers() returned; the scaler of another precision stays as new."""
        for k, v in numbers["counters"].items():
            setattr(self.engine.engine, k, v)
        for k, v in numbers["loss_scaler"].items() if same_precision else ():
            setattr(self.optimizer.loss_scaler, k, v)

    # -- DeepSpeed's insides --------------------------------------------------------------------------

    def _swap_in(self, i: int) -> bool:
        if not (self.sharded and self.optimizer._swappable_optimizer_subgroup(i)):
            return False
        self.optimizer._optimizer_states_and_gradient_swap_in(i)
        return True

    def _master(self, i: int) -> Tensor:
        o = self.optimizer
        return o.fp32_partitioned_groups_flat[i] if self.sharded else o.single_partition_of_fp32_groups[i]

    def _inner(self, i: int) -> Any:
        """The optimizer that updates a partition: with a ratio below 1 some sub-groups stay on the device."""
        o = self.optimizer
        on_device = self.sharded and o.offload_optimizer and o.subgroup_to_device[i] != "cpu"
        return o.backup_optimizer if on_device else o.optimizer

    def _states(self, i: int) -> dict[str, Any]:
        return self._inner(i).state[self._master(i)]  # a defaultdict: empty before the first step

    def _param_group(self, i: int) -> dict[str, Any]:
        return self._inner(i).param_groups[self.optimizer.sub_group_to_group_id[i] if self.sharded else i]


def generators() -> dict[str, Tensor]:
    """The states of all random generators that training draws from, as bytes."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found | {f"tracker.{k}": v for k, v in get_cuda_rng_tracker().get_states().items()}


def set_generators(states: Mapping[str, Tensor]) -> None:
    """Put back what generators() returned."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states({k.removeprefix("tracker."): v for k, v in states.items() if k.startswith("tracker.")})
