"""A sweep: one run after the other in the same processes, and a table of how they ended.

    torchrun --nproc-per-node 2 examples/sweep.py

Each run is what it would be by itself: weights, data order and optimizer start anew from run.seed.
"""

import os
import sys
from pathlib import Path

from toolkit import Config, ToolkitError, Trainer
from toolkit.config.load import load_config

QUICKSTART = Path(__file__).parents[1] / "launch/recipes/quickstart.yaml"
RATES = (1.0e-4, 1.0e-3, 1.0e-2, 1.0e-1)


def final_loss(config: Config, rate: float) -> float:
    """The last step's loss with a learning rate; infinite where the run broke down."""
    overrides = {"optimizer.lr": rate, "optimizer.min_lr": 0.0, "run.dir": f"runs/sweep/lr-{rate:g}"}
    try:
        return Trainer(config, overrides=overrides).fit().loss
    except ToolkitError as error:  # raised on all ranks alike, so that all go on with the next run
        print(error)
        return float("inf")


if __name__ == "__main__":
    config = load_config(QUICKSTART, ["train.steps=50", "train.eval_every=0", "log.every=50", *sys.argv[1:]])
    losses = {rate: final_loss(config, rate) for rate in RATES}
    if os.environ.get("RANK", "0") == "0":
        print("\nlearning rate   loss")
        for rate, loss in sorted(losses.items(), key=lambda one: one[1]):
            print(f"{rate:13g}   {loss:.4f}")
