"""Making optimizers: parameter groups as toolkit.arch.optimizers says, and what updates them.

optimizer = make_optimizer(parameter_groups(chunks, config, tied=None), config.optimizer)

DeepSpeed then replaces each group's parameters by one flat fp32 tensor, of which a rank holds a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from toolkit.config.schema import OptimizerSection, RunConfig
from toolkit.model.init import named_weights

ParameterGroup = dict[str, Any]


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
    return [{"params": params, "weight_decay": decay} for params, decay in zip(members, decays, strict=True) if params]


def make_optimizer(groups: list[ParameterGroup], section: OptimizerSection) -> torch.optim.Optimizer:
    """What updates these groups on the device."""
    return _MAKERS[section.spec.matrices.name](groups, section)


def _adamw(groups: list[ParameterGroup], o: OptimizerSection) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def _adam(groups: list[ParameterGroup], o: OptimizerSection) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


_MAKERS: Mapping[str, Callable[[list[ParameterGroup], OptimizerSection], torch.optim.Optimizer]] = {"adamw": _adamw, "adam": _adam}
