"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from toolkit.config.schema import OptimizerSection


def learning_rate(optimizer: OptimizerSection, *, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant, linear, cosine or WSD.

    linear and cosine reach min_lr at decay_steps (null: total_steps) and stay there. wsd (warm-up,
    stable, decay; MiniCPM, arXiv 2404.06395) stays at lr and falls linearly to min_lr over its last
    decay_steps (null: a tenth of total_steps).
    """
    o = optimizer
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    if o.schedule == "constant":
        return o.lr
    if o.schedule == "wsd":
        length = o.decay_steps if o.decay_steps is not None else max(1, total_steps // 10)
        progress = (step - (total_steps - length)) / length
        return o.lr + (o.min_lr - o.lr) * min(1.0, max(0.0, progress))
    end = o.decay_steps if o.decay_steps is not None else total_steps
    progress = min(1.0, (step - o.warmup_steps) / max(1, end - o.warmup_steps))
    if o.schedule == "linear":
        return o.lr + (o.min_lr - o.lr) * progress
    return o.min_lr + (o.lr - o.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
