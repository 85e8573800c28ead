"""The configurations that a rehearsal is compared with the estimate on: 124M to 405B, GPT and Llama, one GPU to 16,384."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

from toolkit.config.load import parse_config
from toolkit.config.schema import RunConfig
from toolkit.hardware.catalogue import parse_hardware
from toolkit.parallel.rules import violations

SHAPES: dict[str, dict[str, Any]] = {
    "gpt-124m": {"family": "gpt", "layers": 12, "hidden": 768, "heads": 12, "groups": 12, "ffn": 3072, "vocab": 50257, "tied": True},
    "gpt-1.3b": {"family": "gpt", "layers": 24, "hidden": 2048, "heads": 16, "groups": 16, "ffn": 8192, "vocab": 50257, "tied": True},
    "gpt-175b": {"family": "gpt", "layers": 96, "hidden": 12288, "heads": 96, "groups": 96, "ffn": 49152, "vocab": 51200, "tied": True},
    "llama-1b": {"family": "llama", "layers": 16, "hidden": 2048, "heads": 32, "groups": 8, "ffn": 8192, "vocab": 128256, "tied": True},
    "llama-8b": {"family": "llama", "layers": 32, "hidden": 4096, "heads": 32, "groups": 8, "ffn": 14336, "vocab": 128256, "tied": False},
    "llama-70b": {"family": "llama", "layers": 80, "hidden": 8192, "heads": 64, "groups": 8, "ffn": 28672, "vocab": 128256, "tied": False},
    "llama-405b": {
        "family": "llama",
        "layers": 128,
        "hidden": 16384,
        "heads": 128,
        "groups": 8,
        "ffn": 53248,
        "vocab": 128256,
        "tied": False,
    },
}
# shape, tp, pp, dp: from one GPU to 16,384; the larger a model, the more it is cut
LAYOUTS = [
    ("gpt-124m", 1, 1, 1),
    ("gpt-124m", 1, 1, 8),
    ("gpt-124m", 2, 2, 2),
    ("gpt-1.3b", 2, 1, 4),
    ("gpt-1.3b", 2, 4, 8),
    ("llama-1b", 1, 1, 8),
    ("llama-1b", 2, 2, 4),
    ("llama-8b", 1, 1, 64),
    ("llama-8b", 4, 2, 8),
    ("llama-8b", 2, 4, 16),
    ("gpt-175b", 8, 16, 32),
    ("llama-70b", 8, 4, 16),
    ("llama-70b", 8, 16, 64),
    ("llama-405b", 8, 16, 128),
]


@dataclass(frozen=True)
class Point:
    """One configuration: the run's YAML, its GPUs and the pipeline stage that is rehearsed."""

    name: str
    raw: Any
    world: int
    stage: int

    @property
    def config(self) -> RunConfig:
        return parse_config(self.raw)


def grid() -> list[Point]:
    """Every ZeRO stage and recompute mode on every layout that the rules allow; precision, SP, VPP and the stage take turns."""
    found = []
    precisions, splits, chunks = cycle(("bf16", "bf16", "fp16", "fp32", "bf16")), cycle((True, True, False)), cycle((1, 2, 1))
    every = product(LAYOUTS, range(4), ("none", "selective", "full"))
    for turns, ((shape, tp, pp, dp), zero, recompute) in enumerate(every, 1):
        precision, sp, vpp = next(precisions), next(splits) and tp > 1, next(chunks) if pp > 1 else 1
        stage = (0, pp - 1, pp // 2)[turns % 3]
        found.append(point(shape, tp=tp, pp=pp, dp=dp, zero=zero, recompute=recompute, precision=precision, sp=sp, vpp=vpp, stage=stage))
    return [p for p in found if not violations(p.config, p.world, machine=parse_hardware("h100-80gb:8x1").machine)]


def point(
    shape: str,
    *,
    tp: int,
    pp: int,
    dp: int,
    zero: int,
    recompute: str,
    precision: str,
    sp: bool,
    vpp: int,
    stage: int,
    offload: str = "none",
) -> Point:
    """A configuration of the grid with few micro-batches: the peak needs no more than fill the pipeline."""
    s = SHAPES[shape]
    tokens = 1024 if s["hidden"] < 2048 else 2048 if s["hidden"] < 8192 else 4096
    layers = s["layers"]
    if pp > 1 and layers % (pp * vpp):
        vpp = 1
    raw: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {
            "family": s["family"],
            "num_layers": layers,
            "hidden_size": s["hidden"],
            "num_attention_heads": s["heads"],
            "num_query_groups": s["groups"],
            "ffn_hidden_size": s["ffn"],
            "vocab_size": s["vocab"],
            "max_position_embeddings": tokens,
            "tie_embeddings": s["tied"],
        },
        "parallel": {"tp": tp, "pp": pp, "vpp": vpp, "sequence_parallel": sp},
        "zero": {"stage": zero, "offload_optimizer": offload},
        "train": {
            "global_batch_size": dp * max(2, pp),
            "micro_batch_size": 1,
            "seq_length": tokens,
            "precision": precision,
            "recompute": recompute,
        },
    }
    name = f"{shape} tp{tp} pp{pp}" + (f" vpp{vpp}" if vpp > 1 else "") + f" dp{dp}" + (" sp" if sp else "")
    name += f" ZeRO-{zero} {recompute} {precision}" + (f" offload {offload}" if offload != "none" else "") + f", stage {stage}"
    return Point(name, raw, tp * pp * dp, stage)
