"""What training must give, computed by code that nobody here wrote.

The model is transformers', the optimizer, the clipping and the learning rates are PyTorch's.
toolkit only reads the samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR


@dataclass
class Truth:
    """A run's figures, one a step (norms before clipping), and its weights at the end under
    transformers' names.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def batches(raw: dict[str, Any], *, valid: bool = False) -> list[Tensor]:
    """Every global batch [b, s + 1] of a run's training or validation samples, in order."""
    from toolkit.config.load import parse_config
    from toolkit.data.dataset import build_datasets, resolve_data

    config = parse_config(raw)
    train_set, valid_set, _ = build_datasets(config, resolve_data(config, prepare_missing=True))
    chosen, size = valid_set if valid else train_set, config.train.global_batch_size
    count = config.train.eval_steps if valid else config.train.steps
    return [torch.stack([torch.from_numpy(chosen[i]["text"]) for i in range(k * size, (k + 1) * size)]).long() for k in range(count)]


def load(folder: Path) -> Any:
    """transformers' model of a folder, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(folder: Path, raw: dict[str, Any]) -> Truth:
    """Train the model of a Hugging Face folder as a run's config asks: its warm-up and cosine, its
    clipping, its AdamW or Adam.

    Weight decay is on matrices only, as the papers have it.
    """
    o, t = raw["optimizer"], raw["train"]
    model = load(folder).eval()  # no dropout
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    kind = torch.optim.Adam if o.get("name") == "adam" else torch.optim.AdamW
    optimizer = kind(
        [{"params": matrices, "weight_decay": o["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=o["lr"],
        betas=o["betas"],
        eps=o["eps"],
    )
    schedule = _schedule(optimizer, steps=t["steps"], warmup=o["warmup_steps"], lowest=o["min_lr"])
    truth = Truth()
    for batch in batches(raw):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        limit = t["grad_clip"] or float("inf")
        truth.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        truth.losses.append(float(loss))
        truth.lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    truth.weights = {k: v.detach() for k, v in model.state_dict().items()}
    return truth


def _schedule(optimizer: torch.optim.Optimizer, *, steps: int, warmup: int, lowest: float) -> Any:
    rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    fall = CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=lowest)
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


@torch.no_grad()
def evaluate(folder: Path, raw: dict[str, Any]) -> float:
    """Mean loss of a folder's model over a run's validation batches, without dropout."""
    model = load(folder).eval()
    losses = [float(model(input_ids=batch, labels=batch).loss) for batch in batches(raw, valid=True)]
    return sum(losses) / len(losses)
