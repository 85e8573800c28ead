"""The configurations that a rehearsal is compared with the estimate on: 124M to 405B, GPT and
Llama, one GPU to 16,384.

Named ones that people train, and two covering sets: in each, every two settings that can meet do
meet in one configuration, and every three of those that are not a layout. The estimate is mended
with a look at the first set only; the second one is held out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations, product, zip_longest
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
        "layers": 126,
        "hidden": 16384,
        "heads": 128,
        "groups": 8,
        "ffn": 53248,
        "vocab": 128256,
        "tied": False,
    },
}
# shape, tp, pp, dp, stages that are rehearsed: from one GPU to 16,384; the larger a model, the more it is cut
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
    ("llama-70b", 8, 8, 64),
    ("llama-405b", 8, 16, 128),
]
# optimizer, parameters
OFFLOADS = (("none", "none"), ("cpu", "none"), ("cpu", "cpu"))
FACTORS: dict[str, tuple[Any, ...]] = {
    "layout": tuple(LAYOUTS),
    "zero": (0, 1, 2, 3),
    "offload": OFFLOADS,
    "recompute": ("none", "selective", "full"),
    "precision": ("bf16", "fp16", "fp32"),
    "sp": (False, True),
    "vpp": (1, 2),
    "place": ("first", "middle", "last"),
}
MACHINE = parse_hardware("h100-80gb:8x1").machine


@dataclass(frozen=True)
class Point:
    """One configuration: the run's YAML, its GPUs and the pipeline stage that is rehearsed."""

    name: str
    raw: Any
    world: int
    stage: int
    held_out: bool = False

    @property
    def config(self) -> RunConfig:
        return parse_config(self.raw)


def grid() -> list[Point]:
    """The covering sets by turns, then the named configurations, of which every second one is held
    out too.
    """
    first, second = covering()
    pairs = [p for both in zip_longest(first, second) for p in both if p]
    return pairs + [replace(p, held_out=i % 2 == 1) for i, p in enumerate(named())]


def named() -> list[Point]:
    """Large models as they are trained, each rehearsed on the stage that needs most and some on the
    last one too.
    """
    common: dict[str, Any] = {"recompute": "none", "precision": "bf16", "sp": True, "vpp": 1, "zero": 1}
    found = []
    for tp, pp, dp, more in (
        (8, 4, 2, {}),
        (8, 4, 4, {"zero": 2}),
        (8, 4, 8, {"vpp": 4}),
        (8, 8, 8, {}),
        (8, 1, 8, {"zero": 3, "recompute": "full"}),
        (8, 1, 64, {"zero": 3, "recompute": "full"}),
    ):
        found += [point("llama-70b", tp=tp, pp=pp, dp=dp, stage=stage, tokens=8192, **common | more) for stage in sorted({0, pp - 1})]
    for tp, pp, dp, more in (
        (8, 16, 8, {}),
        (8, 16, 64, {"recompute": "full"}),
        (8, 16, 128, {}),
        (8, 16, 128, {"zero": 2, "recompute": "selective"}),
        (8, 16, 128, {"zero": 3}),
    ):
        found += [
            point("llama-405b", tp=tp, pp=pp, dp=dp, stage=stage, tokens=8192, **common | more) for stage in (0, 1)[: 2 if not more else 1]
        ]
    for tp, pp, dp, more in ((8, 8, 16, {"recompute": "full"}), (8, 16, 8, {"vpp": 3}), (8, 16, 8, {"zero": 2, "precision": "fp16"})):
        found += [point("gpt-175b", tp=tp, pp=pp, dp=dp, stage=stage, **common | more) for stage in (0, pp - 1)]
    return found


def covering() -> tuple[list[Point], list[Point]]:
    """Two sets without a common configuration. Greedy: the next one is that which adds most
    combinations; of two equal ones the first.
    """
    names = tuple(FACTORS)
    settings = [dict(zip(names, values, strict=True)) for values in product(*FACTORS.values())]
    legal = {frozenset(x.items()): p for x in settings if possible(x) and not violations((p := _of(x)).config, p.world, machine=MACHINE)}
    adds = {key: combinations_of(dict(key)) for key in legal}
    sets: list[list[Point]] = []
    for held_out in (False, True):
        wanted: set[Any] = set().union(*adds.values())
        sets.append([])
        while wanted:
            best = max(adds, key=lambda key, wanted=wanted: len(adds[key] & wanted))
            wanted -= adds.pop(best)
            sets[-1].append(replace(legal[best], held_out=held_out))
    return sets[0], sets[1]


def possible(x: dict[str, Any]) -> bool:
    """Without what could only repeat another configuration: stages, chunks and split sequences that
    are not there.
    """
    _, tp, pp, _ = x["layout"]
    whole = pp > 1 or (x["vpp"] == 1 and x["place"] == "first")
    return whole and (pp > 2 or x["place"] != "middle") and (tp > 1 or not x["sp"]) and (x["zero"] > 0 or x["offload"][0] == "none")


def combinations_of(x: dict[str, Any]) -> set[Any]:
    """Every pair of settings, and every three of those that are not layouts."""
    items = sorted(x.items())
    triples = combinations([item for item in items if item[0] not in ("layout", "place")], 3)
    return {*combinations(items, 2), *triples}


def _of(x: dict[str, Any]) -> Point:
    shape, tp, pp, dp = x["layout"]
    stage = {"first": 0, "middle": pp // 2, "last": pp - 1}[x["place"]]
    keys = {k: x[k] for k in ("zero", "recompute", "precision", "sp", "vpp")}
    return point(shape, tp=tp, pp=pp, dp=dp, stage=stage, offload=x["offload"], **keys)


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
    offload: tuple[str, str] = ("none", "none"),
    tokens: int | None = None,
) -> Point:
    """A configuration of the grid with few micro-batches: the peak needs no more than fill the pipeline."""
    s = SHAPES[shape]
    tokens = tokens or (1024 if s["hidden"] < 2048 else 2048 if s["hidden"] < 8192 else 4096)
    layers = s["layers"]
    microbatches = 2 * pp if pp <= 4 else pp
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
        "zero": {"stage": zero, "offload_optimizer": offload[0], "offload_param": offload[1]},
        "train": {
            "global_batch_size": dp * microbatches,
            "micro_batch_size": 1,
            "seq_length": tokens,
            "precision": precision,
            "recompute": recompute,
        },
    }
    name = f"{shape} tp{tp} pp{pp}" + (f" vpp{vpp}" if vpp > 1 else "") + f" dp{dp}" + (" sp" if sp else "")
    name += f" ZeRO-{zero} {recompute} {precision}" + "".join(
        f" {what} on cpu" for what, place in zip(("optimizer", "parameters"), offload, strict=True) if place == "cpu"
    )
    return Point(f"{name}, stage {stage}", raw, tp * pp * dp, stage)
