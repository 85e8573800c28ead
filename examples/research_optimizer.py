"""An optimizer of one's own: Lion (arXiv 2302.06675), which moves every weight by the sign of its
momentum.

    torchrun --nproc-per-node 2 examples/research_optimizer.py

It runs on any layout and in every stage of ZeRO, since it looks at one element at a time: each rank
updates its part of the weights, as one flat tensor for each group. `momentum` is as long as that
tensor, so checkpoints keep it, and a run goes on with it on any other layout.
"""

import sys
from pathlib import Path

import torch

from toolkit import Trainer

QUICKSTART = Path(__file__).parents[1] / "launch/recipes/quickstart.yaml"


class Lion(torch.optim.Optimizer):
    """groups: of a weight decay each; the run's schedule sets their lr."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.0, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            fast, slow = group["betas"]
            for weights in group["params"]:
                if not self.state[weights]:
                    self.state[weights]["momentum"] = torch.zeros_like(weights)
                momentum = self.state[weights]["momentum"]
                weights.mul_(1 - group["lr"] * group["weight_decay"])
                weights.sub_(torch.lerp(weights.grad, momentum, fast).sign(), alpha=group["lr"])
                momentum.lerp_(weights.grad, 1 - slow)


if __name__ == "__main__":
    overrides = ["run.dir=runs/lion", "optimizer.lr=3e-4", "optimizer.min_lr=3e-5"]
    Trainer(QUICKSTART, overrides=[*overrides, *sys.argv[1:]], optimizer=Lion).fit()
