"""What an engine holds that a resumed run needs: flat partitions of weights and moments, counters,
random generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from toolkit.arch.optimizers import OptimizerSpec
from toolkit.engine.deepspeed_state import DeepSpeedState, full_shape
from toolkit.engine.partitions import Fragment
from toolkit.model.init import named_weights

MASTER = "master"


@dataclass(frozen=True)
class SavedPartition:
    """One optimizer group of this rank (ZeRO-3: sub-group). tensors: "master" (fp32, flat) and the
    optimizer's states by its own names.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, float]
    fragments: list[Fragment]


class EngineState:
    """Reads and sets what an engine's optimizer holds, whatever the ZeRO stage and wherever it lives."""

    def __init__(self, engine: Any) -> None:
        config = engine.config
        self.held = DeepSpeedState(engine)
        self.swapping = "nvme" in (config.zero.offload_optimizer, config.zero.offload_param)
        """Partitions are read from disk one at a time, and are gone when the next one is."""
        self.spec = config.model.spec
        self.optimizer: OptimizerSpec | None = None if engine.plugged_in else config.optimizer.spec
        self.names: dict[int, str] = {}
        self.parameters: dict[str, dict[str, Any]] = {}
        for chunk in engine.chunks:
            for weight, p in named_weights(chunk, self.spec):
                self.names[id(p)] = weight.name
                self.parameters[weight.name] = {"shape": full_shape(p), "dim": weight.cut.dim, "blocks": weight.cut.blocks}

    def __len__(self) -> int:
        return len(self.held)

    def partitions(self) -> Iterator[SavedPartition]:
        """This rank's partitions in order; the tensors are the live ones, to be read only."""
        for i in range(len(self)):
            swapped = self.held.swap_in(i)
            master, states = self.held.master(i), self.held.states(i)
            tensors = {MASTER: master.detach()} | {k: v.detach() for k, v in states.items() if isinstance(v, Tensor)}
            numbers = {k: v for k, v in states.items() if isinstance(v, (int, float))}
            yield SavedPartition(tensors, numbers, self.fragments(i))
            self.held.swap_out(i, changed=False, swapped=swapped)

    @torch.no_grad()
    def set(self, index: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Give a partition its values; ValueError where they are of another size."""
        swapped = self.held.swap_in(index)
        master, states = self.held.master(index), self.held.states(index)
        if problem := self.foreign(index, tensors):
            raise ValueError(problem)
        if tensors[MASTER].numel() != master.numel():
            raise ValueError(f"group {index} has {master.numel()} values here and {tensors[MASTER].numel()} there")
        master.data.copy_(tensors[MASTER])
        for key, value in tensors.items():
            if key != MASTER:
                self._set_state(index, states, key, value)
        states.update(numbers)
        self.held.swap_out(index, changed=True, swapped=swapped)

    @torch.no_grad()
    def fill(self, index: int, read: Callable[[Tensor, str, str, int], None], *, keys: Sequence[str], step: int | None) -> None:
        """Give a partition its values fragment by fragment: read(out, name, key, start) fills a
        flat piece of a live tensor.

        keys: "master", and the optimizer's states to set; step: the updates it has made, for its
        own count. Padding becomes zero.
        """
        swapped = self.held.swap_in(index)
        master, states = self.held.master(index), self.held.states(index)
        fragments = self.fragments(index)
        for key in keys:
            if key != MASTER and key not in states:
                states[key] = torch.zeros_like(master.data)
            flat = (master if key == MASTER else states[key]).data
            flat.zero_()
            for f in fragments:
                read(flat[f.at : f.at + f.count], f.name, key, f.start)
        if step is not None and self.held.counts_in_python(index):
            states["step"] = step
        elif step is not None:
            self._set_state(index, states, "step", torch.tensor(float(step)))
        self.held.swap_out(index, changed=True, swapped=swapped)

    def _set_state(self, index: int, states: dict[str, Any], key: str, value: Tensor) -> None:
        if key in states:
            states[key].data.copy_(value)
            return
        # torch keeps the step count of a fused optimizer beside the parameters, any other on the CPU
        group = self.held.param_group(index)
        with_parameters = value.dim() > 0 or group.get("fused") or group.get("capturable")
        states[key] = value.to(device=self.held.master(index).device if with_parameters else "cpu", copy=True)

    def members(self, i: int) -> list[str]:
        """Names of all weights that ranks share out in a partition, of which this rank may have none."""
        return [self.names[id(p)] for p in self.held.members(i)]

    def fragments(self, i: int) -> list[Fragment]:
        """Which elements of which parameters a partition holds, in its order."""
        return [Fragment(self.names[id(p)], start, at, numel) for p, start, at, numel in self.held.places(i)]

    def foreign(self, i: int, keys: Iterable[str]) -> str:
        """In words, how a partition's saved states differ from those that its optimizer keeps; ""
        where they do not, or where nothing is known of the optimizer, or nothing was saved yet.
        """
        there = set(keys) - {MASTER, "step"}
        if self.optimizer is None or not there:
            return ""
        group = self.optimizer.group_of(self.spec.weight(self.members(i)[0]).group)
        here = set(self.optimizer.groups[group].rule.states)
        mine, theirs = (", ".join(sorted(states)) or "none" for states in (here, there))
        return f"its optimizer has the states {theirs}, and this run's {self.optimizer.name} keeps {mine}" if here != there else ""

    def before_set(self) -> None:
        """Call before the first set()."""
        self.held.before_set()

    def after_set(self) -> None:
        """Bring the weights used in forward in line with the masters; every rank calls it after its
        last set().
        """
        self.held.after_set()

    def numbers(self) -> dict[str, dict[str, float]]:
        """Step counters of the engine and the state of fp16's loss scaler."""
        scaler = {k: v for k, v in vars(self.held.loss_scaler).items() if isinstance(v, (int, float))}
        return {"counters": dict(self.held.counters), "loss_scaler": scaler}

    def set_numbers(self, numbers: Mapping[str, Mapping[str, float]], *, same_precision: bool = True) -> None:
        """Put back what numbers() returned; the scaler of another precision stays as new."""
        self.held.set_counters(numbers["counters"])
        for k, v in numbers["loss_scaler"].items() if same_precision else ():
            setattr(self.held.loss_scaler, k, v)


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
