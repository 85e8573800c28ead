"""Which runs are compared with the single-process run: the whole legal space of up to 4 ranks, and
covers of the rest.
"""

from __future__ import annotations

import copy
import functools
import random
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

from toolkit.config.load import parse_config
from toolkit.parallel.rules import violations

STEPS = 20
BOUNDS = {  # worst relative difference of (loss, gradient norm) over all steps
    "fp32": (1e-5, 1e-4),
    "bf16": (1e-3, 2e-2),
    "fp16": (2e-4, 1e-2),
}
ABBREVIATED = {"zero_hpz_partition_size": "hpz", "overlap_comm": "overlap"}
# DeepSpeed's defaults take gigabytes a rank for a model of any size, and three ranks of them the
# whole machine
SMALL_BUFFERS: dict[str, Any] = {"reduce_bucket_size": 1_000_000}
SMALL_SWAP: dict[str, Any] = {"max_in_cpu": 1_000_000}
NVME = "NVME"  # replaced by a folder of the test session


@dataclass(frozen=True)
class Cell:
    """One run: its world size and the YAML keys that differ from BASE."""

    world: int
    keys: dict[str, Any] = field(hash=False)

    @property
    def id(self) -> str:
        k = self.keys
        parts = [
            k.get("model.family", "llama"),
            *([k["optimizer.name"]] if "optimizer.name" in k else []),
            *(f"{d}{k[f'parallel.{d}']}" for d in ("tp", "pp", "vpp", "cp") if k.get(f"parallel.{d}", 1) > 1),
            *([k["parallel.cp_exchange"]] if "parallel.cp_exchange" in k else []),
        ]
        dp = self.world // (k.get("parallel.tp", 1) * k.get("parallel.pp", 1) * k.get("parallel.cp", 1))
        parts += [f"dp{dp}"] if dp > 1 else []
        parts += ["sp"] if k.get("parallel.sequence_parallel") else []
        parts += [f"zero{k.get('zero.stage', 0)}"]
        parts += [
            f"{short}-{k[key]}"
            for short, key in (("opt", "zero.offload_optimizer"), ("param", "zero.offload_param"))
            if k.get(key, "none") != "none"
        ]
        uneven = k.get("model.num_layers", 2) % (k.get("parallel.pp", 1) * k.get("parallel.vpp", 1))
        parts += [f"{k['model.num_layers']}-layers"] if uneven else []
        parts += ["tied"] if k.get("model.tie_embeddings") else []
        parts += [ABBREVIATED[key] for key in k.get("zero.deepspeed", {}).get("zero_optimization", {})]
        parts += ["compile"] if k.get("model.compile") else []
        parts += [f"{b}-bias-{str(k[key]).lower()}" for b in ("attention", "mlp", "norm") if (key := f"model.{b}_bias") in k]
        parts += [f"{k['model.num_query_groups']}-groups"] if "model.num_query_groups" in k and self.world != 3 else []
        parts += ["pieces"] if k.get("train.chunked_loss") == "always" else []
        parts += ["documents"] if k.get("data.document_mask") else []
        parts += ["qknorm"] if k.get("model.qk_layernorm") else []
        parts += [f"recompute-{k['train.recompute']}"] if k.get("train.recompute", "none") != "none" else []
        parts += ["inputs-cpu"] if k.get("train.offload_activations") else []
        parts += [k["train.precision"]] if k.get("train.precision", "fp32") != "fp32" else []
        return "-".join(map(str, parts))

    @property
    def precision(self) -> str:
        return str(self.keys.get("train.precision", "fp32"))

    @property
    def reference(self) -> Cell:
        """The single-process ZeRO-0 run whose losses and norms this one must have."""
        same = ("model.", "optimizer.", "train.precision", "train.global_batch_size", "train.seq_length", "data.")
        return Cell(1, {k: v for k, v in self.keys.items() if k.startswith(same) and k != "model.compile"} | {"zero.stage": 0})

    def uses(self, device: str) -> bool:
        return device in (self.keys.get("zero.offload_optimizer"), self.keys.get("zero.offload_param"))

    @property
    def uses_param_nvme(self) -> bool:
        return self.keys.get("zero.offload_param") == "nvme"

    @property
    def features(self) -> frozenset[tuple[str, Any]]:
        """What a run consists of, one value of each dimension; `test_the_default_cells_cover` holds
        them to the cells that always run.
        """
        k = self.keys
        degrees = {d: k.get(f"parallel.{d}", 1) for d in ("tp", "pp", "vpp", "cp")}
        found = degrees | {
            "dp": self.world // (degrees["tp"] * degrees["pp"] * degrees["cp"]),
            "world": self.world,
            "sequence parallel": bool(k.get("parallel.sequence_parallel")),
            "stage": k.get("zero.stage", 0),
            "optimizer": k.get("zero.offload_optimizer", "none"),
            "param": k.get("zero.offload_param", "none"),
            "family": k.get("model.family", "llama"),
            "tied": bool(k.get("model.tie_embeddings")),
            "precision": self.precision,
            "recompute": k.get("train.recompute", "none"),
        }
        return frozenset(found.items())

    @property
    def rare(self) -> bool:
        """Of the whole space, what only `make parity` runs: NVMe, which DeepSpeed compiles minutes
        for, and CPU offload on 3 or 4 ranks, half of the suite's time. The cover has offload on 4
        ranks in every test run.
        """
        return self.uses("nvme") or (self.uses("cpu") and self.world > 2)

    def raw(self, *, nvme: str = "/nvme") -> dict[str, Any]:
        """The run's YAML as a mapping."""
        raw = copy.deepcopy(BASE)
        for dotted, value in self.keys.items():
            section, key = dotted.split(".")
            raw.setdefault(section, {})[key] = value
        if self.uses("nvme"):
            raw["zero"]["nvme_path"] = nvme
            raw["zero"]["deepspeed"] = {
                "zero_optimization": SMALL_BUFFERS | ({"offload_param": SMALL_SWAP} if self.uses_param_nvme else {})
            }
        return raw

    def legal(self) -> bool:
        return not violations(parse_config(self.raw()), self.world)


BASE: dict[str, Any] = {
    "model": {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 128,
        "vocab_size": 250,
        "max_position_embeddings": 32,
        "init_std": 0.05,
    },
    "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "seq_length": 32, "precision": "fp32"},
    # gentle: a training that is itself unstable turns rounding of 1e-7 into 1e-4 within 20 steps,
    # differently on each processor
    "optimizer": {"lr": 3.0e-4, "schedule": "constant"},
}
EIGHT_LAYERS = {"model.num_layers": 8}
THREES = {  # a shape that three ranks can share
    "model.num_layers": 6,
    "model.hidden_size": 48,
    "model.num_attention_heads": 6,
    "model.num_query_groups": 3,
    "model.ffn_hidden_size": 96,
    "model.vocab_multiple": 96,
    "train.global_batch_size": 12,
}
OFFLOADS = [(stage, opt, param) for stage, opt, param in product(range(4), ("none", "cpu", "nvme"), ("none", "cpu", "nvme"))]


def _cell(world: int, tp: int, pp: int, vpp: int, sp: bool, stage: int, opt: str, param: str, **more: Any) -> Cell:
    keys = {"parallel.tp": tp, "parallel.pp": pp, "parallel.vpp": vpp, "parallel.sequence_parallel": sp}
    keys |= {"zero.stage": stage, "zero.offload_optimizer": opt, "zero.offload_param": param}
    return Cell(world, keys | {k.replace("__", "."): v for k, v in more.items()})


@functools.cache
def llama() -> list[Cell]:
    """Every combination the rules allow on 1 to 4 ranks, in fp32."""
    cells = []
    for world, tp, pp, vpp, sp, (stage, opt, param) in product((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), (1, 2), (False, True), OFFLOADS):
        if world % (tp * pp):
            continue
        cell = _cell(world, tp, pp, vpp, sp, stage, opt, param)
        cell = Cell(world, cell.keys | (THREES if world == 3 else layers(pp * vpp)) | batches(world // (tp * pp), pp, world))
        if cell.legal() and cell.keys | {"zero.stage": 0} != cell.reference.keys:
            cells.append(cell)
    return cells


@functools.cache
def extras() -> list[Cell]:
    """torch.compile as far as the rules leave it, ZeRO++'s second partition of parameters (hpZ),
    biases other than the family's, overlap_comm, which many a DeepSpeed JSON has, stages that
    differ because the layers do not divide, and the other families.
    """
    hpz = {"zero.stage": 3, "zero.deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 2}}}
    compiled = [Cell(2, {"model.compile": True, "zero.stage": stage, "parallel.pp": pp}) for stage, pp in ((0, 1), (1, 2))]
    sp = {"parallel.tp": 2, "parallel.sequence_parallel": True}
    biases = [
        Cell(2, sp | {"model.attention_bias": True, "zero.stage": 1}),
        Cell(4, sp | {"model.mlp_bias": True, "parallel.pp": 2, "zero.stage": 3}),
        Cell(2, sp | {"model.family": "gpt", "zero.stage": 2} | {f"model.{k}_bias": False for k in ("attention", "mlp", "norm")}),
    ]
    overlap = {"zero.deepspeed": {"zero_optimization": {"overlap_comm": True}}}
    overlapped = [Cell(2, overlap | {"zero.stage": stage}) for stage in range(4)]
    overlapped += [
        Cell(2, overlap | {"zero.stage": 1, "zero.offload_optimizer": "cpu"}),
        Cell(2, overlap | {"zero.stage": 2, "parallel.pp": 2}),
    ]
    uneven = [
        _uneven(2, 3, {"parallel.pp": 2, "zero.stage": 2, "model.tie_embeddings": True}),
        _uneven(4, 6, {"parallel.pp": 4, "zero.stage": 1}),
        _uneven(2, 6, {"parallel.pp": 2, "parallel.vpp": 2, "zero.stage": 3}),
        _uneven(4, 5, {"parallel.pp": 2, "zero.stage": 3, "model.family": "gpt", "train.precision": "bf16"}),
        _uneven(4, 7, {"parallel.pp": 2, "parallel.vpp": 2, "zero.stage": 1, "train.recompute": "full"} | sp),
    ]
    families = [
        Cell(2, {"model.family": "mistral", "zero.stage": 2, "model.sliding_window": 32}),
        Cell(2, sp | {"model.family": "qwen2", "zero.stage": 1}),
        Cell(4, {"model.family": "qwen2", "parallel.tp": 2, "parallel.pp": 2, "zero.stage": 3, "model.tie_embeddings": True}),
        Cell(2, {"model.family": "qwen3", "model.head_dim": 16, "parallel.pp": 2, "zero.stage": 2}),
        Cell(4, sp | {"model.family": "qwen3", "model.head_dim": 16, "parallel.pp": 2, "zero.stage": 3}),
    ]
    apart = {"data.document_mask": True}
    documents = [
        # a stage in the middle, which reads no tokens, must know where documents end
        Cell(3, apart | THREES | ON_HOST | {"parallel.pp": 3, "zero.stage": 3, "train.recompute": "full"} | batches(1, 3, 3)),
    ]
    return [Cell(4, hpz), Cell(4, hpz | {"parallel.pp": 2}), *compiled, *biases, *overlapped, *uneven, *families, *optimizers(), *documents]


ON_HOST = {"train.offload_activations": True}
MUON = {"optimizer.name": "muon"}
# of two data-parallel ranks, whose partitions meet within a matrix: with an even number they meet
# between layers
CUT_MATRICES = {"zero.stage": 1, "model.num_layers": 3}


def optimizers() -> list[Cell]:
    """Muon where a matrix is cut in each way it can be, and SGD over the stages of ZeRO."""
    sgd = {"optimizer.name": "sgd", "optimizer.lr": 0.03}
    tp, pp, sp = {"parallel.tp": 2}, {"parallel.pp": 2}, {"parallel.tp": 2, "parallel.sequence_parallel": True}
    muon = [
        (2, tp | {"zero.stage": 0}),
        (2, {"zero.stage": 0}),
        (2, CUT_MATRICES),
        (3, THREES | {"model.num_layers": 4, "zero.stage": 1}),
        (4, sp | CUT_MATRICES | {"model.qk_layernorm": True}),
        (4, tp | pp | {"zero.stage": 1}),
        (4, pp | {"zero.stage": 1, "model.tie_embeddings": True}),
        (4, sp | {"zero.stage": 1, "model.family": "gpt", "train.precision": "bf16"}),
        (2, pp | {"zero.stage": 1, "parallel.vpp": 2, "model.num_layers": 6, "train.precision": "fp16"}),
    ]
    plain = [
        (2, sp | {"zero.stage": 1}),
        (4, tp | {"zero.stage": 2}),
        (4, pp | {"zero.stage": 3, "model.tie_embeddings": True}),
        (2, {"zero.stage": 2, "train.precision": "bf16"}),
    ]
    rows = [(world, MUON | keys) for world, keys in muon] + [(world, sgd | keys) for world, keys in plain]
    return [Cell(world, keys | batches(world // _model_ranks(keys), keys.get("parallel.pp", 1), world)) for world, keys in rows]


def _model_ranks(keys: dict[str, Any]) -> int:
    return int(keys.get("parallel.tp", 1) * keys.get("parallel.pp", 1))


def _context(world: int, cp: int, exchange: str, stage: int, **more: Any) -> Cell:
    keys = {"parallel.cp": cp, "parallel.cp_exchange": exchange, "zero.stage": stage} | {k.replace("__", "."): v for k, v in more.items()}
    model = _model_ranks(keys)
    shape = THREES | {"train.seq_length": 30} if world == 3 else layers(keys.get("parallel.pp", 1) * keys.get("parallel.vpp", 1))
    return Cell(world, shape | batches(world // (model * cp), keys.get("parallel.pp", 1), world) | keys)


@functools.cache
def context() -> list[Cell]:
    """Context parallelism of 2, 3 and 4 with each exchange and whatever else is legal on up to 4
    ranks, in fp32 and without offload.
    """
    cells = []
    for world, cp, tp, pp, vpp, sp, stage, exchange, apart in product(
        (2, 3, 4), (2, 3, 4), (1, 2), (1, 2), (1, 2), (False, True), range(4), ("allgather", "ulysses", "ring"), (False, True)
    ):
        if world % (cp * tp * pp):
            continue
        more = {"parallel__tp": tp, "parallel__pp": pp, "parallel__vpp": vpp, "parallel__sequence_parallel": sp}
        cell = _context(world, cp, exchange, stage, **more, **({"data__document_mask": True} if apart else {}))
        if cell.legal():
            cells.append(cell)
    return cells


def context_cover() -> list[Cell]:
    """Context parallelism in every test run: each degree, exchange and stage, and each once with
    what it must work with.
    """
    sp = {"parallel__tp": 2, "parallel__sequence_parallel": True}
    pp = {"parallel__pp": 2}
    apart = {"data__document_mask": True}
    return [
        _context(2, 2, "allgather", 1),
        _context(3, 3, "ring", 2, **apart),
        _context(4, 4, "ulysses", 1, model__num_query_groups=2),  # more ranks than key/value heads
        _context(4, 2, "allgather", 3, **pp, parallel__vpp=2, **apart, model__tie_embeddings=True),
        _context(4, 2, "ring", 0, **sp, train__chunked_loss="always"),
        _context(4, 2, "allgather", 2, model__qk_layernorm=True),  # beside two data-parallel ranks
    ]


def long_context() -> list[Cell]:
    """What only `make parity` runs of context parallelism, documents kept apart and the loss in
    pieces, beside the grid of context().
    """
    sp = {"parallel.tp": 2, "parallel.sequence_parallel": True}
    apart, pieces = {"data.document_mask": True}, {"train.chunked_loss": "always"}
    return [
        Cell(2, apart | {"zero.stage": 2, "model.family": "gpt"}),  # learned positions begin again
        Cell(2, pieces | {"parallel.pp": 2, "zero.stage": 2, "model.tie_embeddings": True} | batches(1, 2, 2)),
        _context(2, 2, "ulysses", 3, **{"data__document_mask": True}, model__family="gpt"),
        _context(4, 4, "ulysses", 1, model__num_query_groups=2, train__precision="bf16"),
        _context(4, 2, "ring", 3, parallel__pp=2, parallel__vpp=2, train__recompute="selective"),
        _context(4, 4, "allgather", 2, train__recompute="full", train__precision="fp16"),
        _context(2, 2, "allgather", 2, zero__offload_optimizer="cpu"),
        _context(2, 2, "ulysses", 3, zero__offload_optimizer="cpu", zero__offload_param="cpu", train__precision="bf16"),
        Cell(4, apart | sp | {"zero.stage": 1, "train.recompute": "selective"}),
        Cell(4, apart | {"parallel.pp": 2, "parallel.vpp": 2, "zero.stage": 1, "train.precision": "bf16"} | layers(4) | batches(2, 2, 4)),
        Cell(2, pieces | sp | {"zero.stage": 1}),
        Cell(4, pieces | {"parallel.tp": 2, "zero.stage": 3, "model.tie_embeddings": True}),
        Cell(2, pieces | {"zero.stage": 1, "train.precision": "bf16", "parallel.tp": 2}),
    ]


def _uneven(world: int, layers: int, keys: dict[str, Any]) -> Cell:
    dp = world // (keys.get("parallel.tp", 1) * keys["parallel.pp"])
    return Cell(world, keys | {"model.num_layers": layers} | batches(dp, keys["parallel.pp"], world))


def families() -> list[Cell]:
    """Every family at every ZeRO stage; those that extras() and cover() have already are left out."""
    shapes: dict[str, dict[str, Any]] = {"mistral": {"model.sliding_window": 32}, "qwen2": {}, "qwen3": {"model.head_dim": 16}}
    there = {(c.keys["model.family"], c.keys["zero.stage"]) for c in extras() if "model.family" in c.keys}
    missing = [(f, stage) for f in shapes for stage in range(4) if (f, stage) not in there]
    # by turns on two data-parallel and two tensor-parallel ranks
    layouts: tuple[dict[str, Any], ...] = ({}, {"parallel.tp": 2})
    return [Cell(2, {"model.family": f, "zero.stage": stage} | shapes[f] | layouts[i % 2]) for i, (f, stage) in enumerate(missing)]


def pairs(cell: Cell) -> set[Any]:
    """What a cell covers: each of its features, and each together with its ZeRO stage."""
    stage = next(f for f in cell.features if f[0] == "stage")
    return set(cell.features) | {(stage, f) for f in cell.features}


@functools.cache
def always() -> list[Cell]:
    """The cells of every test run: special() cells, the pairwise cover, and as few of the whole
    space as its features need.

    The rest of the space runs with `make parity`.
    """
    compiled = [c for c in extras() if c.keys.get("model.compile")]
    # half a minute of compiling each: one of them is enough for every test run
    chosen = [*(c for c in extras() if c not in compiled[:-1]), *families(), *special(), *cover(), *context_cover()]
    candidates = [c for c in llama() if not c.rare]
    wanted = set().union(*(pairs(c) for c in candidates)) - set().union(*(pairs(c) for c in chosen))
    while wanted:
        best = max(candidates, key=lambda c: len(pairs(c) & wanted))
        wanted -= pairs(best)
        chosen.append(best)
    return chosen


def special() -> list[Cell]:
    """What pairs of features do not name: a tied embedding whose copies ZeRO-2 and 3 hold on two
    stages, with and without offload, and interleaved chunks whose gradients ZeRO-3 would carry over
    to the next step.
    """
    tied = {"parallel.pp": 2, "model.tie_embeddings": True}
    return [
        *(Cell(2, tied | {"zero.stage": stage} | batches(1, 2, 2)) for stage in (2, 3)),
        Cell(4, tied | {"parallel.tp": 2, "zero.stage": 3, "parallel.sequence_parallel": True} | batches(1, 2, 4)),
        Cell(2, tied | {"zero.stage": 2, "zero.offload_optimizer": "cpu"} | batches(1, 2, 2)),
        Cell(2, {"parallel.pp": 2, "parallel.vpp": 2, "zero.stage": 3} | layers(4) | batches(1, 2, 2)),
    ]


FACTORS: dict[str, tuple[Any, ...]] = {
    "parallel.tp": (1, 2, 4),
    "parallel.pp": (1, 2, 4),
    "parallel.vpp": (1, 2),
    "dp": (1, 2, 4),
    "parallel.sequence_parallel": (False, True),
    "zero.stage": (0, 1, 2, 3),
    "zero.offload_optimizer": ("none", "cpu"),
    "zero.offload_param": ("none", "cpu"),
    "model.family": ("gpt", "llama"),
    "model.tie_embeddings": (False, True),
    "model.qk_layernorm": (False, True),
    "train.recompute": ("none", "selective", "full"),
    "train.precision": ("fp32", "bf16", "fp16"),
}


@functools.cache
def cover(*, candidates: int = 1500, seed: int = 1) -> list[Cell]:
    """A pairwise cover: each legal pair of two factors' values is in some cell, found greedily.

    Pairs that none of the sampled legal rows has count as impossible.
    """
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < candidates:
        row = {k: draw.choice(v) for k, v in FACTORS.items()}
        if row["parallel.tp"] * row["parallel.pp"] * row["dp"] <= 4 and _covered(row).legal():
            rows.append(row)
    pairs = [{((a, row[a]), (b, row[b])) for a, b in combinations(FACTORS, 2)} for row in rows]
    wanted: set[Any] = set().union(*pairs)
    chosen = []
    while wanted:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & wanted))
        wanted -= pairs[best]
        chosen.append(_covered(rows[best]))
    return chosen


def _covered(row: dict[str, Any]) -> Cell:
    keys = {k: v for k, v in row.items() if k != "dp"}
    world = row["parallel.tp"] * row["parallel.pp"] * row["dp"]
    shape = layers(keys["parallel.pp"] * keys["parallel.vpp"]) | batches(row["dp"], keys["parallel.pp"], world)
    return Cell(world, keys | shape)


def batches(dp: int, pp: int, world: int) -> dict[str, Any]:
    """A micro-batch that gives a pipeline four micro-batches and the rest two, of the same global batch."""
    rows = (12 if world == 3 else 8) // dp
    return {"train.micro_batch_size": max(1, rows // (3 if world == 3 else 4 if pp > 1 else 2))}


def layers(chunks: int) -> dict[str, Any]:
    """As many layers as the pipeline has chunks, and at least two: more only take longer."""
    return {"model.num_layers": chunks} if chunks > 2 else {}
