"""Hooks: numbers of one's own in each step's record, and an end once the evaluation no longer
improves.

torchrun --nproc-per-node 2 examples/early_stop.py
"""

import math
import sys
from pathlib import Path

from toolkit import Trainer

QUICKSTART = Path(__file__).parents[1] / "launch/recipes/quickstart.yaml"
OVERRIDES = ["run.dir=runs/early-stop", "train.steps=1000", "train.eval_every=20", "train.eval_steps=2"]


def perplexity(step):
    """Into metrics.jsonl, the step line and the monitor."""
    step.add("perplexity", math.exp(step.record.loss))


class EarlyStop:
    """Ends the run after `patience` evaluations in a row that are not better than the best one by
    `least`.
    """

    def __init__(self, patience, least=0.01):
        self.patience, self.least = patience, least
        self.best, self.waited = math.inf, 0

    def __call__(self, step):
        if step.record.eval_loss < self.best - self.least:
            self.best, self.waited = step.record.eval_loss, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            step.stop(f"no evaluation below {self.best:.4f} - {self.least} for {self.waited} times")


if __name__ == "__main__":
    overrides = [*OVERRIDES, *sys.argv[1:]]
    Trainer(QUICKSTART, overrides=overrides, on_step=perplexity, on_eval=EarlyStop(patience=2)).fit()
