"""Optimizers: which weights each one updates by which rule, and what a rule keeps for a weight. No torch.

optimizer = OPTIMIZERS["adamw"]
for group in optimizer.groups:
    print(group.weights, group.rule.name, group.rule.states)

What is said here, the engine, checkpoints, the memory estimate and the table of rules go by. A new
optimizer is an entry of OPTIMIZERS; one with a rule of its own also has a maker in
toolkit.engine.optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from toolkit.arch.spec import Group, WeightSpec


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a weight is updated.

    states: fp32 tensors as long as the weight that are kept from step to step, by torch's names.
    counts: the number of updates is kept beside them, 4 bytes for each optimizer group. whole: an element's
    update depends on the whole matrix, so a rank must see what others hold of it.
    """

    name: str
    states: tuple[str, ...]
    counts: bool = False
    whole: bool = False

    @property
    def state_bytes(self) -> int:
        """Bytes of the states for each element, without the fp32 weights themselves."""
        return 4 * len(self.states)


@dataclass(frozen=True)
class OptimizerGroup:
    """Weights that are updated alike and lie in one flat tensor. tied: the copies of a tied embedding
    under pipeline parallelism, which two stages must cut alike."""

    rule: Rule
    weights: tuple[Group, ...]
    decayed: bool
    tied: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """An optimizer.

    title: one line for docs/configuration.md. matrices, others: the rules for the matrices of layers,
    and for embeddings, the output layer, norms and biases. on_cpu: DeepSpeed can update offloaded
    weights with it. momentum, nesterov: defaults of the config's keys, None where it has no such thing.
    json: what a DeepSpeed JSON calls it in optimizer.type; json_settings: keys of the config's section,
    with the values that mean what DeepSpeed does under that name.
    """

    name: str
    title: str
    matrices: Rule
    others: Rule
    on_cpu: bool = False
    momentum: float | None = None
    nesterov: bool | None = None
    json: tuple[str, ...] = ()
    json_settings: tuple[tuple[str, str], ...] = ()

    @property
    def whole(self) -> bool:
        """Whether some weight's update depends on the whole weight."""
        return self.matrices.whole or self.others.whole

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the config's optimizer section that it goes by, beside the schedule's."""
        adam = any("exp_avg" in rule.states for rule in (self.matrices, self.others))
        return ("lr", "weight_decay", *(("betas", "eps") if adam else ()), *(("momentum", "nesterov") if self.momentum is not None else ()))

    @cached_property
    def groups(self) -> tuple[OptimizerGroup, ...]:
        """Optimizer groups in the engine's order. Norms and biases are not decayed."""
        large: tuple[OptimizerGroup, ...]
        if self.matrices == self.others:
            large = (OptimizerGroup(self.matrices, ("matrix", "embedding"), True),)
        else:
            large = (OptimizerGroup(self.matrices, ("matrix",), True), OptimizerGroup(self.others, ("embedding",), True))
        vectors, tied = OptimizerGroup(self.others, ("vector",), False), OptimizerGroup(self.others, ("embedding",), True, tied=True)
        return (*large, vectors, tied)

    def group_of(self, weight: Group, *, tied: bool = False) -> int:
        """Index in groups of a weight. tied: it is a copy of an embedding that two stages share."""
        return next(i for i, group in enumerate(self.groups) if group.tied == tied and weight in group.weights)

    def with_settings(self, *, momentum: float | None, nesterov: bool | None) -> OptimizerSpec:
        """The same with the config's settings (None: the default). SGD without momentum keeps no state."""
        momentum = self.momentum if momentum is None else momentum
        nesterov = self.nesterov if nesterov is None else nesterov
        if (momentum, nesterov) == (self.momentum, self.nesterov):
            return self
        spec = replace(self, momentum=momentum, nesterov=nesterov)
        return replace(spec, matrices=PLAIN_SGD, others=PLAIN_SGD) if self.others == SGD and momentum == 0 else spec

    @cached_property
    def indices(self) -> tuple[tuple[Group, int], ...]:
        """group_of every kind of weight that is no tied copy."""
        kinds: tuple[Group, ...] = ("matrix", "vector", "embedding")
        return tuple((kind, self.group_of(kind)) for kind in kinds)

    @cached_property
    def tied_index(self) -> int:
        """group_of a tied copy."""
        return self.group_of("embedding", tied=True)

    def split(self, weights: Iterable[WeightSpec], *, tied: str | None) -> list[list[WeightSpec]]:
        """Weights of a stage by optimizer group, in their order; a group may be empty. tied: global
        name of an embedding that two stages share.
        """
        found: list[list[WeightSpec]] = [[] for _ in self.groups]
        for weight in weights:
            found[self.group_of(weight.group, tied=weight.name == tied)].append(weight)
        return found


_MOMENTS = ("exp_avg", "exp_avg_sq")
ADAMW = Rule(name="adamw", states=_MOMENTS, counts=True)
ADAM = Rule(name="adam", states=_MOMENTS, counts=True)
SGD = Rule(name="sgd", states=("momentum_buffer",))
PLAIN_SGD = Rule(name="sgd", states=())
MUON = Rule(name="muon", states=("momentum_buffer",), whole=True)

OPTIMIZERS: Mapping[str, OptimizerSpec] = {
    o.name: o
    for o in (
        OptimizerSpec(name="adamw", title="decoupled weight decay", matrices=ADAMW, others=ADAMW, on_cpu=True, json=("AdamW", "Adam")),
        OptimizerSpec(name="adam", title="L2", matrices=ADAM, others=ADAM, on_cpu=True),
        OptimizerSpec(name="sgd", title="momentum, L2", matrices=SGD, others=SGD, momentum=0.9, nesterov=False, json=("SGD",)),
        OptimizerSpec(
            name="muon",
            title="orthogonal updates of the layers' matrices, adamw for the rest",
            matrices=MUON,
            others=ADAMW,
            momentum=0.95,
            nesterov=True,
            json=("Muon",),
            json_settings=(("adjust_lr", "original"),),
        ),
    )
}
