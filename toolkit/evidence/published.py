"""Rows of published measurements (any field may be null) to workloads, and predictions for them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.arch.spec import ModelSpec
from toolkit.cost.memory import GIB, estimate
from toolkit.cost.step import step_time
from toolkit.cost.workload import Workload
from toolkit.errors import ConfigError, ToolkitError
from toolkit.evidence.software import Software, software
from toolkit.hardware import calibration
from toolkit.hardware.catalogue import Gpu, Hardware, find_gpu


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What predict_file() did: rows read, rows answered, and the reasons of the rest with their counts."""

    rows: int
    answered: int
    unsupported: dict[str, int]


class Unsupported(Exception):
    """A row says too little, or something no formula here covers."""


def predict_file(source: Path, out: Path, *, scales: Mapping[tuple[str, str], float] | None = None) -> Summary:
    """Predict every row of a JSONL file of configurations and write one JSON object a line in the scorer's format.

    A row that cannot be answered gets "unsupported" with the reason. Raises ConfigError for a file that cannot be
    read or a line that is no JSON object.
    """
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{str(source)!r} cannot be read", why=str(error), fix="Give a JSONL file of configurations.") from None
    answers = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"line {number} of {str(source)!r} is not JSON", why=str(error), fix="Write one object a line.") from None
        answers.append(predict(row if isinstance(row, dict) else {}, scales=scales))
    Path(out).write_text("".join(json.dumps(a) + "\n" for a in answers), encoding="utf-8")
    reasons: dict[str, int] = {}
    for answer in answers:
        if reason := answer.get("unsupported"):
            reasons[reason] = reasons.get(reason, 0) + 1
    return Summary(rows=len(answers), answered=len(answers) - sum(reasons.values()), unsupported=reasons)


def predict(row: Mapping[str, Any], *, scales: Mapping[tuple[str, str], float] | None = None) -> dict[str, Any]:
    """One row's answer: fits, peak_allocated_gib, peak_reserved_gib, tokens_per_s_per_gpu, or unsupported with a reason."""
    try:
        workload, hardware = read_row(row)
        scale = None if scales is None else calibration.lookup(scales, hardware.gpu, workload.precision)
        guessed = unknown_settings(row)
        time = step_time(workload, hardware, scale=scale, unknown=guessed)
        memory = estimate(workload, hardware, unknown=guessed)
    except (Unsupported, ToolkitError) as reason:
        return {"id": row.get("id"), "unsupported": str(reason)}
    stage = memory.worst
    return {
        "id": row.get("id"),
        "fits": memory.chance >= 0.5,
        "p_fits": round(memory.chance, 4),
        "peak_allocated_gib": round(stage.allocated / GIB, 3),
        "peak_reserved_gib": round(stage.device / GIB, 3),
        "tokens_per_s_per_gpu": round(time.tokens_per_s_per_gpu, 3),
        "range": {
            "peak_allocated_gib": [round(end / GIB, 3) for end in memory.spread.interval(stage.allocated)],
            "peak_reserved_gib": [round(end / GIB, 3) for end in memory.spread.interval(stage.device)],
            "tokens_per_s_per_gpu": [round(end, 3) for end in time.spread.interval(time.tokens_per_s_per_gpu)],
        },
    }


# settings that change time or memory much, so that a guess widens the interval
_COUNTED = (
    ("model", "seq_len"),
    ("batch", "micro"),
    ("batch", "global"),
    ("parallel", "tp"),
    ("parallel", "pp"),
    ("parallel", "vpp"),
    ("parallel", "zero_stage"),
    ("hardware", "gpu"),
)


def unknown_settings(row: Mapping[str, Any]) -> int:
    """How many of them a row leaves out, or gives as inferred."""
    inferred = row.get("inferred_fields")
    names = {str(name) for name in inferred} if isinstance(inferred, list) else set()
    count = sum(_in(row, section).get(key) is None or f"{section}.{key}" in names for section, key in _COUNTED)
    return count + sum(row.get(name) is None or name in names for name in ("recompute", "precision", "attention"))


def read_row(row: Mapping[str, Any]) -> tuple[Workload, Hardware]:
    """A row as workload and hardware, missing fields filled with what such runs usually have; raises Unsupported or ConfigError."""
    model, hw, parallel, batch = (_in(row, key) for key in ("model", "hardware", "parallel", "batch"))
    spec = _spec(model)
    tp, pp, cp = (_count(parallel.get(key)) or 1 for key in ("tp", "pp", "cp"))
    world = _count(hw.get("count")) or tp * pp * cp * (_count(parallel.get("dp")) or 1)
    dp = _count(parallel.get("dp")) or max(1, world // (tp * pp * cp))
    seq = _count(model.get("seq_len")) or 2048
    micro = _count(batch.get("micro"))
    total = _count(batch.get("global")) or (micro or 1) * dp * (4 * pp if pp > 1 else 1)
    precision = str(row.get("precision") or "bf16").lower()
    if precision not in ("bf16", "fp16", "fp32", "fp8"):
        raise Unsupported(f"precision {precision} has no formula")
    flash = _flash(row)
    framework = str(row.get("framework") or "").lower()
    stage = _stage(parallel.get("zero_stage"), framework)
    soft = software(row, flash=flash, zero=stage, tp=tp, pp=pp, precision=precision)
    zero = _usual_stage(framework, flash=flash, pp=pp) if stage is None else stage
    recompute = _recompute(row)
    gpu = _gpu(hw)
    offload = str(parallel.get("offload") or "none").lower()
    if "vocabulary placement" in _flags(row):
        raise Unsupported("vocabulary layers placed by hand have no formula")
    if any((_count(model.get(key)) or 0) > 1 for key in ("experts", "num_experts", "moe_experts")):
        raise Unsupported("mixtures of experts have no formula")
    offload = "none" if "activation" in offload and "optim" not in offload else offload
    workload = Workload(
        model=spec,
        seq=seq,
        micro=micro or 1,
        batch=total,
        tp=tp,
        pp=pp,
        vpp=_count(parallel.get("vpp"))
        or _usual_interleaving(soft, layers=spec.layers, pp=pp, microbatches=max(1, total // ((micro or 1) * dp))),
        cp=cp,
        dp=dp,
        sp=tp > 1 and _sequence_parallel(parallel.get("sequence_parallel"), soft),
        zero=zero,
        offload_optimizer="nvme" if "nvme" in offload else "cpu" if offload not in ("none", "false", "") else "none",
        offload_param=("nvme" if "nvme" in offload else "cpu") if "param" in offload else "none",
        recompute=recompute,
        precision=precision,
        flash=flash,
        stack=soft.stack,
        **_features(row, kind=soft.kind),
    )
    return workload, _hardware(hw, gpu, workload.world)


def _in(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = row.get(key)
    return value if isinstance(value, Mapping) else {}


def _flags(row: Mapping[str, Any]) -> str:
    flags = row.get("flags")
    return " ".join(map(str, flags)).lower() if isinstance(flags, list) else ""


def _count(value: Any) -> int | None:
    """A whole number of at least 1, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or not 1 <= value < 2**40:
        return None
    return int(value)


def _stage(stage: Any, framework: str) -> int | None:
    """The printed ZeRO stage, or the one that the framework's name says."""
    if isinstance(stage, (int, float)) and not isinstance(stage, bool) and stage in (0, 1, 2, 3):
        return int(stage)
    named = re.search(r"zero[-_ ]?([0-3])", framework)
    return int(named[1]) if named else None


def _usual_stage(framework: str, *, flash: bool, pp: int) -> int:
    """The ZeRO stage that nobody prints: the framework's default. DeepSpeed's pipelines refuse stages above 1."""
    if re.search(r"fsdp|titan|composer|foundry|infinity", framework):
        return 3
    if "deepspeed" in framework:
        return 1 if pp > 1 else 2
    return 1 if flash else 0


def _usual_interleaving(soft: Software, *, layers: int, pp: int, microbatches: int) -> int:
    """Chunks of a stage that nobody prints: with Megatron, which interleaves since 2021, as many as keep the bubble below 5 %.

    It needs whole micro-batches for every stage and equal chunks; a user who has neither does without.
    """
    if pp == 1 or soft.kind not in ("megatron", "nemo") or layers % pp or microbatches % pp:
        return 1
    each = layers // pp
    chunks = [v for v in range(1, each + 1) if each % v == 0]
    return next((v for v in chunks if (pp - 1) / microbatches / v <= 0.05), chunks[-1])


def _sequence_parallel(value: Any, soft: Software) -> bool:
    """The printed switch; without one, on in Megatron's recipes since it has it (2022)."""
    return value if isinstance(value, bool) else soft.kind in ("megatron", "nemo") and soft.year >= 2023


def _spec(model: Mapping[str, Any]) -> ModelSpec:
    layers, hidden = _count(model.get("layers")), _count(model.get("hidden"))
    if layers is None or hidden is None:
        raise Unsupported("the row gives no model.layers or model.hidden")
    family = str(model.get("family") or "").lower()
    heads = _count(model.get("heads")) or max(1, hidden // 128)
    gated = model.get("gated_mlp")
    gated = bool(gated) if gated is not None else family in ("llama", "mistral", "qwen", "gemma", "internlm")
    ffn = _count(model.get("ffn_hidden")) or (-(-8 * hidden // 3 // 256) * 256 if gated else 4 * hidden)
    tied = model.get("tied_embeddings")
    learned = family in ("gpt", "mpt", "opt", "bloom")
    vocab = _count(model.get("vocab")) or (50304 if not gated else 32000)
    biases = family in ("gpt", "opt", "bloom")
    return ModelSpec(
        layers=layers,
        hidden=hidden,
        heads=heads,
        groups=min(heads, _count(model.get("kv_heads")) or heads),
        head_dim=_count(model.get("head_dim")) or max(1, hidden // heads),
        ffn=ffn,
        gated=gated,
        norm="rms" if gated else "layer",
        vocab=vocab,
        rows=-(-vocab // 128) * 128,  # frameworks pad the vocabulary so that multiplies of it are aligned
        tied=bool(tied) if tied is not None else learned,
        positions=(_count(model.get("seq_len")) or 2048) if learned else 0,
        qkv_bias=biases,
        proj_bias=biases,
        mlp_bias=biases,
        norm_bias=biases,
        dropout=family == "gpt",
    )


def _flash(row: Mapping[str, Any]) -> bool:
    kind = row.get("attention")
    text = f"{row.get('attention_as_printed') or ''} {row.get('framework') or ''}".lower()
    if kind is None:
        return not re.search(r"unfused|no flash", text)
    if "unfused" in str(kind) and re.search(r"flashattention|\bfa\d", text):
        return True  # the printed name says more than the class
    return "unfused" not in str(kind)


def _features(row: Mapping[str, Any], *, kind: str) -> dict[str, Any]:
    """What a row's flags say of the run itself, as fields of a workload."""
    printed = str(row.get("attention_as_printed") or "").lower()
    flags = _flags(row)
    features: dict[str, Any] = {
        "kernel": _kernel(printed),
        "overlap": "overlap disabled" not in flags,
        "cp_exchange": "ulysses" if "all-to-all" in flags else "ring",
        "split_checkpoints": "zero-r" in flags,
        "deterministic": "deterministic" in flags,
        "fused_accumulation": "no grad-accum fusion" not in flags,
    }
    if "zero++" in flags:
        features |= {"qwz": True, "qgz": True, "hpz": 8}
    if "not stated" in printed and kind == "deepspeed":
        features["kernel"] = "efficient"  # Hugging Face's default passes SDPA a mask, which rules the flash kernel out
    return features


def _kernel(printed: str) -> str | None:
    for pattern, name in (
        (r"flash\S*-?4|fa4", "flash4"),
        (r"flash\S*-?3|\bfa3", "flash3"),
        (r"cudnn|\bte\b|transformer engine", "cudnn"),
        (r"triton", "triton"),
        (r"flash\S*-?2|\bfa2|sdpa", "flash2"),
        (r"flash\S*-?1\b|\bfa1", "flash1"),
    ):
        if re.search(pattern, printed):
            return name
    return None


def _recompute(row: Mapping[str, Any]) -> Any:
    mode = str(row.get("recompute") or "none").lower()
    detail = str(row.get("recompute_detail") or "").lower()
    if mode == "selective" and ("every other matmul" in detail or "selective op" in detail):
        return "half"
    if mode == "selective" and "layer" in detail:
        return "alternate"
    return mode if mode in ("none", "selective", "full") else "none"


def _gpu(hw: Mapping[str, Any]) -> Gpu:
    """The row's GPU by name; by the first word of its name and its memory where the name is unusual or comes in two sizes."""
    name, memory = str(hw.get("gpu") or ""), _count(hw.get("gpu_mem_gb"))
    if not name:
        raise Unsupported("the row gives no hardware.gpu")
    base = re.split(r"[-_ ]", re.sub(r"(?i)^nvidia[-_ ]", "", name.strip()))[0]
    found = None
    for candidate in (name, f"{base}-{memory}gb", base):
        try:
            gpu = find_gpu(candidate)
        except ConfigError:
            continue
        found = found or gpu
        if memory is None or 0.8 < gpu.memory_gib / memory < 1.1:
            return gpu
    return found or find_gpu(name)


def _hardware(hw: Mapping[str, Any], gpu: Gpu, world: int) -> Hardware:
    per_node = min(_count(hw.get("gpus_per_node")) or gpu.gpus_per_node, world)
    nodes = max(1, -(-world // per_node))
    text = str(hw.get("interconnect") or "")
    share = next((share for name, share in _REACHED if name in text.lower()), 0.0)
    return Hardware(gpu=gpu, gpus_per_node=per_node, nodes=nodes, nic_gb_s=_nic(text, per_node) or gpu.nic_gb_s, nic_share=share)


# the part of a port's rate that collectives reach where somebody has measured less than InfiniBand gives. Omni-Path: 40.5 of 100 Gb/s,
# bus bandwidth of NCCL 2.10 over four nodes (bigscience, experiments/bandwidth/all_reduce_bench-a100-n4.txt)
_REACHED = (("omni-path", 0.405), ("omnipath", 0.405))
# Gb/s of a port of networks that are printed by name alone: their makers' datasheets
_PORTS = (("omni-path", 100), ("omnipath", 100), ("fdr", 56), ("edr", 100), ("hdr", 200), ("ndr", 400), ("slingshot", 200))


def _nic(text: str, per_node: int) -> float | None:
    """One GPU's network GB/s from a printed interconnect, such as "8x HDR InfiniBand 200 Gb/s per node"."""
    if found := re.search(r"(\d+)\s*x\s*(\d+)\s*Gb", text):
        return int(found[1]) * int(found[2]) / 8 / per_node
    if found := re.search(r"(\d+)\s*x[^,;]*?(\d+)\s*Gb/?s", text):
        return int(found[1]) * int(found[2]) / 8 / per_node
    if found := re.search(r"(\d+)\s*Gb/?s per GPU", text):
        return int(found[1]) / 8
    if found := re.search(r"(\d+)\s*Gb(?:/s|ps)?(?: per node)?", text):
        return int(found[1]) / 8 / per_node
    lower = text.lower()
    if port := next((gb for name, gb in _PORTS if name in lower), None):
        counted = re.search(r"(\d+)\s*x", lower)
        return (int(counted[1]) if counted else 1) * port / 8 / per_node
    return None
