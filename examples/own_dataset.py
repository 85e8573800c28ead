"""Data of one's own: any map-style data set of token arrays, here sequences that count in steps,
and a mask for the loss.

    torchrun --nproc-per-node 2 examples/own_dataset.py

Each sample is taken once, in an order that run.seed decides; a run that resumes goes on with the
next one.
"""

import sys

import numpy as np

from toolkit import Trainer

IDS, LENGTH = 64, 32
CONFIG = {
    "run": {"dir": "runs/own-dataset"},
    "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128, "vocab_size": IDS},
    "train": {"steps": 30, "global_batch_size": 16, "micro_batch_size": 4, "seq_length": LENGTH, "precision": "fp32"},
    "optimizer": {"lr": 3.0e-3},
    "log": {"every": 10},
}


class Counting:
    """Sample i counts from i in steps of 1 to 5, modulo IDS."""

    identity = "counting, version 1"  # a checkpoint remembers it: a resumed run must have the same data

    def __len__(self):
        return 10_000

    def __getitem__(self, i):
        text = (i + np.arange(LENGTH + 1) * (1 + i % 5)) % IDS
        return {"text": text, "mask": np.arange(LENGTH) >= 1}  # the step cannot be known from one number


def masked_mean(losses, batch):
    """losses [b, s] -> a number: the mean over the tokens that can be known."""
    mask = batch["mask"]
    return (losses * mask).sum() / mask.sum()


if __name__ == "__main__":
    Trainer(CONFIG, overrides=sys.argv[1:], dataset=Counting(), loss=masked_mean).fit()
