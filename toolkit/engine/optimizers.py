"""Making optimizers: parameter groups as toolkit.arch.optimizers says, and what updates them.

optimizer = make_optimizer(parameter_groups(chunks, config, tied=None), config, ranks=ranks)

DeepSpeed then replaces each group's parameters by one flat fp32 tensor, of which a rank holds a part.
note_parts() tells optimizers that look at whole weights what lies in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from toolkit.arch.spec import ModelSpec
from toolkit.config.schema import RunConfig
from toolkit.engine.deepspeed_state import DeepSpeedState
from toolkit.engine.muon import Muon, Ranks, WeightPart
from toolkit.errors import ConfigError, LayoutError, name_of, raised_by
from toolkit.model.init import named_weights
from toolkit.parallel.agree import everywhere

ParameterGroup = dict[str, Any]
OptimizerFactory = Callable[[list[ParameterGroup]], torch.optim.Optimizer]


def parameter_groups(chunks: Sequence[Any], config: RunConfig, *, tied: torch.nn.Parameter | None) -> list[ParameterGroup]:
    """This stage's parameters in the optimizer's groups, with their weight decay; empty groups are left out.

    tied: this stage's copy of an embedding that two stages share.
    """
    optimizer = config.optimizer.spec
    members: list[list[torch.nn.Parameter]] = [[] for _ in optimizer.groups]
    for chunk in chunks:
        for weight, parameter in named_weights(chunk, config.model.spec):
            if parameter.requires_grad:
                members[optimizer.group_of(weight.group, tied=parameter is tied)].append(parameter)
    decays = [config.optimizer.weight_decay if group.decayed else 0.0 for group in optimizer.groups]
    rows = zip(members, decays, optimizer.groups, strict=True)
    return [{"params": params, "weight_decay": decay, "rule": group.rule.name} for params, decay, group in rows if params]


def note_parts(state: DeepSpeedState, chunks: Sequence[Any], model: ModelSpec) -> None:
    """Write into each group, as "parts", which weights its flat tensor holds (below ZeRO-3)."""
    weights = {id(p): weight for chunk in chunks for weight, p in named_weights(chunk, model)}
    for i in range(len(state)):
        start = state.partition_start(i)
        state.param_group(i)["parts"] = [WeightPart(weights[id(p)], tuple(p.shape), at - start) for p, at in state.offsets(i)]


def make_optimizer(groups: list[ParameterGroup], config: RunConfig, *, ranks: Ranks) -> torch.optim.Optimizer:
    """What updates the groups of parameter_groups() on the device."""
    by_rule: dict[str, list[ParameterGroup]] = {}
    for group in groups:
        by_rule.setdefault(group["rule"], []).append(group)
    members = {rule: _MAKERS[rule](of_rule, config, ranks) for rule, of_rule in by_rule.items()}
    return Several(members, groups) if len(members) > 1 else next(iter(members.values()))


def plugged_in(factory: OptimizerFactory, groups: list[ParameterGroup], config: RunConfig, *, tp: int, rank: int) -> torch.optim.Optimizer:
    """The optimizer that a program makes itself; LayoutError where the layout cannot serve it.

    factory(groups) returns a torch.optim.Optimizer over the groups: each has "params" and
    "weight_decay", and is one of those of optimizer.name. The schedule sets "lr" in every step.
    Afterwards each group's "params" is one flat fp32 tensor, which ZeRO cuts anywhere; so an update
    goes element by element, unless factory.needs == "whole weights": then nothing is cut, and
    group["parts"] says which elements are which weight. States as long as the flat tensor are saved
    in checkpoints, and so are a scalar tensor "step" and numbers.
    """
    name = name_of(factory)
    if config.zero.offload_optimizer != "none":
        raise LayoutError(
            f"the optimizer {name} with zero.offload_optimizer={config.zero.offload_optimizer}",
            why="DeepSpeed updates offloaded weights with its own Adam alone",
            fix="Set zero.offload_optimizer=none.",
        )
    if getattr(factory, "needs", None) == "whole weights" and (config.zero.stage > 0 or tp > 1):
        raise LayoutError(
            f"the optimizer {name} needs whole weights, with zero.stage={config.zero.stage} and parallel.tp={tp}",
            why="each rank holds a piece of a weight there",
            fix="Set zero.stage=0 and parallel.tp=1.",
        )
    made: list[torch.optim.Optimizer] = []

    def make() -> None:
        try:
            result = factory(groups)
        except Exception as error:
            raise raised_by(f"the optimizer {name}", error, rank=rank) from error
        if not isinstance(result, torch.optim.Optimizer):
            raise ConfigError(
                f"the optimizer {name} returned {result!r}", fix="Return a torch.optim.Optimizer over the groups it is given."
            )
        made.append(result)

    everywhere(make)
    return made[0]


class Several(torch.optim.Optimizer):
    """One optimizer for each rule, as one optimizer with all groups and all states."""

    def __init__(self, members: dict[str, torch.optim.Optimizer], groups: list[ParameterGroup]) -> None:
        super().__init__(groups, {})
        for member in members.values():
            member.state = self.state
        self.members = members

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the groups in param_groups, which DeepSpeed narrows to one at a time."""
        for group in self.param_groups:
            member = self.members[group["rule"]]
            member.param_groups = [group]
            member.step()


# -- what a rule is made of: a rule of toolkit.arch.optimizers has an entry here ----------------------------


def _adamw(groups: list[ParameterGroup], config: RunConfig, ranks: Ranks) -> torch.optim.Optimizer:
    o = config.optimizer
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def _adam(groups: list[ParameterGroup], config: RunConfig, ranks: Ranks) -> torch.optim.Optimizer:
    o = config.optimizer
    return torch.optim.Adam(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def _sgd(groups: list[ParameterGroup], config: RunConfig, ranks: Ranks) -> torch.optim.Optimizer:
    spec = config.optimizer.spec
    return torch.optim.SGD(groups, lr=config.optimizer.lr, momentum=spec.momentum or 0.0, nesterov=bool(spec.nesterov), fused=True)


def _muon(groups: list[ParameterGroup], config: RunConfig, ranks: Ranks) -> torch.optim.Optimizer:
    o = config.optimizer
    momentum, nesterov = o.spec.momentum or 0.0, bool(o.spec.nesterov)
    return Muon(groups, model=config.model.spec, ranks=ranks, lr=o.lr, momentum=momentum, nesterov=nesterov, adjust_lr=o.adjust_lr)


_MAKERS: Mapping[str, Callable[[list[ParameterGroup], RunConfig, Ranks], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
    "muon": _muon,
}
