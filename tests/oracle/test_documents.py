"""Documents kept apart: transformers on each document alone, against the training program on
samples that hold several.

The loss of a global batch is the sum over all its documents' tokens, divided by their number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle import reference
from tests.oracle.compare import relative
from tests.oracle.test_training import TRAINING

EOD = 256
KEYS = TRAINING | {"train.steps": 6, "train.seq_length": 40, "train.micro_batch_size": 1, "data.document_mask": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"zero.stage": 1, "train.micro_batch_size": 2}),
    "dp2-zero3": (2, {"zero.stage": 3}),
    "tp2-pp2-zero2": (4, {"zero.stage": 2, "parallel.tp": 2, "parallel.pp": 2, "parallel.sequence_parallel": True}),
}


def documents(raw: dict[str, Any]) -> list[list[Tensor]]:
    """For each step, the token sequences of its samples' documents, found by the end-of-document id
    and nothing else.
    """
    from toolkit.config.load import parse_config
    from toolkit.data.dataset import build_datasets, resolve_data

    config = parse_config(raw)
    chosen = build_datasets(config, resolve_data(config, prepare_missing=True))[0]
    size = config.train.global_batch_size
    steps = []
    for k in range(config.train.steps):
        found: list[Tensor] = []
        for i in range(k * size, (k + 1) * size):
            tokens, labels = (torch.as_tensor(chosen[i][key]).long() for key in ("tokens", "labels"))
            mask = chosen[i]["loss_mask"]
            start = 0
            for at in range(len(tokens)):
                last = at + 1 == len(tokens)
                if tokens[at] == EOD or last or (mask[at] and labels[at] != tokens[at + 1]):
                    found.append(torch.cat([tokens[start : at + 1], labels[at : at + 1] if mask[at] else tokens[:0]]))
                    start = at + 1
        # padding is 0, which no text holds
        steps.append([d for d in found if len(d) > 1 and bool(d.any())])
    return steps


def alone(folder: Any, raw: dict[str, Any]) -> reference.Truth:
    """Train transformers' model with every document in a forward pass of its own."""
    o, t = raw["optimizer"], raw["train"]
    model = reference.load(folder).eval()
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": o["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=o["lr"], betas=o["betas"], eps=o["eps"])
    schedule = reference._schedule(optimizer, steps=t["steps"], warmup=o["warmup_steps"], lowest=o["min_lr"])
    truth = reference.Truth()
    for step in documents(raw):
        optimizer.zero_grad()
        count, total = sum(len(d) - 1 for d in step), 0.0
        for document in step:
            logits = model(input_ids=document[None, :-1]).logits[0]
            loss = F.cross_entropy(logits, document[1:], reduction="sum") / count
            loss.backward()
            total += float(loss)
        truth.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), t["grad_clip"])))
        truth.losses.append(total)
        optimizer.step()
        schedule.step()
    return truth


# each model on one process, and each layout of several with one of them
SPARE = {("llama", "tp2-pp2-zero2"), ("gpt2", "dp2-zero3")}


def _parameters() -> list[Any]:
    models = (("llama", "concat"), ("gpt2", "best_fit"))
    return [
        pytest.param(m, packing, layout, id=f"{m}-{packing}-{layout}", marks=[pytest.mark.all_cells] if (m, layout) in SPARE else [])
        for layout in LAYOUTS
        for m, packing in models
    ]


@pytest.mark.parametrize(("model", "packing", "layout"), _parameters())
def test_each_document_is_alone(
    model: str,
    packing: str,
    layout: str,
    folders: Any,
    configured: Callable[..., Any],
    trained: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    truths: dict[str, reference.Truth],
) -> None:
    world, keys = LAYOUTS[layout]
    raw = configured(model, KEYS | keys | {"data.packing": packing})
    lines = tmp_path_factory.mktemp("lines") / "text.jsonl"
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (400,), generator=draw).tolist()
    lines.write_text(
        "".join(f'{{"text": "{"".join("abcdefgh "[(i * i + j * j) % 9] for j in range(n))}"}}\n' for i, n in enumerate(lengths))
    )
    raw["data"] |= {"source": str(lines), "cache_dir": str(raw["run"]["dir"]) + "-data"}
    if model not in truths:
        steps = documents(raw)
        assert len({sum(len(d) - 1 for d in step) for step in steps}) > 1 and len(steps[0]) > 8, "steps must differ in tokens"
        truths[model] = alone(folders(model)[0], raw)
    lines_written, _ = trained(world, raw)
    assert relative([line["loss"] for line in lines_written], truths[model].losses) <= 1e-5
    assert relative([line["grad_norm"] for line in lines_written], truths[model].norms) <= 1e-4


@pytest.fixture(scope="module")
def truths() -> dict[str, reference.Truth]:
    return {}
