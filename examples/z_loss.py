"""A loss of one's own: cross entropy plus z-loss, a small penalty on the softmax's denominator
(PaLM, arXiv 2204.02311).

    torchrun --nproc-per-node 2 examples/z_loss.py

It runs on any layout, such as `… examples/z_loss.py parallel.tp=1 parallel.pp=2`: each tensor
parallel rank has the logits of its own part of the vocabulary, and the two helpers put the parts
together.
"""

import sys
from pathlib import Path

from toolkit import Trainer, label_logits, log_sum_exp

QUICKSTART = Path(__file__).parents[1] / "launch/recipes/quickstart.yaml"
COEFFICIENT = 1.0e-4


def z_loss(logits, batch):
    """logits [s, b, v/tp] -> a number: the mean over the micro-batch's tokens."""
    log_z = log_sum_exp(logits)  # [b, s], fp32
    losses = log_z - label_logits(logits, batch["labels"])  # the cross entropy
    return (losses + COEFFICIENT * log_z.square()).mean()


z_loss.needs = "logits"  # without it a loss is given the per-token cross entropy, [b, s]

if __name__ == "__main__":
    Trainer(QUICKSTART, overrides=["run.dir=runs/z-loss", *sys.argv[1:]], loss=z_loss).fit()
