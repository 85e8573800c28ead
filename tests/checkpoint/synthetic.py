"""A training checkpoint of any size made of random numbers, without an engine: what tools are tried on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from toolkit.checkpoint.identity import model_identity
from toolkit.checkpoint.manifest import Manifest, folder_name, write_manifest
from toolkit.checkpoint.names import group_file, rank_file
from toolkit.checkpoint.target import Target
from toolkit.checkpoint.whole import MASTER, Parameter
from toolkit.config.load import parse_config
from toolkit.parallel.layout import Layout
from toolkit.tensors import write_stream, write_tensors

CHUNK = 1 << 22


def write(folder: Path, model: dict[str, Any], *, dp: int = 1, stage: int = 1, step: int = 3) -> Path:
    """A Llama's checkpoint as `dp` ranks save it; whole tensors lie end to end, so that no two
    ranks hold the same values.
    """
    config = parse_config(
        {"run": {"dir": str(folder)}, "model": model, "zero": {"stage": stage}, "train": {"global_batch_size": 8, "seq_length": 32}}
    )
    target, weights = Target(config, Layout(dp=dp, micro_batch_size=1, num_microbatches=8 // dp)), list(config.model.spec.weights())
    parameters = {w.name: Parameter(list(w.shape), w.cut.dim, w.cut.blocks, 1, {}) for w in weights}
    whole: Any = SimpleNamespace(names=list(parameters), parameter=parameters.__getitem__)
    path = folder / folder_name(step)
    path.mkdir(parents=True)
    numbers = {"counters": {"global_steps": step, "global_samples": 8 * step, "micro_steps": step, "skipped_steps": 0}, "loss_scaler": {}}
    files = []
    for rank in range(dp):
        files.append(write_tensors(path / rank_file(rank), {"cpu": torch.get_rng_state()}, metadata={"numbers": json.dumps(numbers)}))
        for i, cut in enumerate(target.cuts(whole, rank)):
            states = {k: (torch.float32, [cut.numel], noise(cut.fragments, cut.numel)) for k in (MASTER, "exp_avg", "exp_avg_sq")}
            metadata = {
                "numbers": "{}",
                "fragments": json.dumps([list(astuple(f)) for f in cut.fragments]),
                "parameters": json.dumps(target.parameters(whole, {f.name for f in cut.fragments})),
            }
            count = iter([torch.tensor(float(step))])
            files.append(write_stream(path / group_file(rank, i), states | {"step": (torch.float32, [], count)}, metadata=metadata))
    manifest = Manifest(
        step=step,
        consumed_samples=8 * step,
        processes=dp,
        layout=target.cut,
        identity=model_identity(config),
        probe={},
        config=config.model_dump(mode="json"),
        versions={},
        saved_at="2025-01-01T00:00:00Z",
        files=sorted(files, key=lambda f: f.name),
    )
    write_manifest(path, manifest)
    return path


def noise(fragments: list[Any], numel: int) -> Iterator[torch.Tensor]:
    """Random values where parameters are, zeros in the padding."""
    used = fragments[-1].at + fragments[-1].count if fragments else 0
    for start in range(0, numel, CHUNK):
        part = torch.randn(min(CHUNK, numel - start))
        part[max(0, used - start) :] = 0
        yield part


def state_bytes(model: dict[str, Any]) -> tuple[int, int]:
    """Bytes of all states, and of the largest whole tensor."""
    sizes = [4 * w.count for w in parse_config({"run": {"dir": "."}, "model": model}).model.spec.weights()]
    return 3 * sum(sizes), max(sizes)
