"""Which software a published row ran, as switches of toolkit.cost.stack: from what it says, else what was usual in its year."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from toolkit.cost.stack import TOOLKIT, Stack

KINDS = (
    (r"megatron.*deepspeed|deepspeed.*megatron|neox", "megatron-deepspeed"),
    (r"deepspeed|colossal", "deepspeed"),
    (r"nemo|megatron-?bridge|megascale", "nemo"),
    (r"toolkit", "toolkit"),
    (r"megatron|mcore|mlperf", "megatron"),
    (r"composer|foundry|mosaic|titan|fsdp|litgpt|lit-gpt|olmo|fairscale", "fsdp"),
    (r"hugging|transformers|\bhf\b|accelerate|llama-?factory|axolotl|unsloth|trl", "deepspeed"),
)


@dataclass(frozen=True, kw_only=True)
class Software:
    """A kind of software, the year it is taken to be of, its switches, and whether the row names something known."""

    kind: str
    year: int
    stack: Stack
    known: bool


def software(row: Mapping[str, Any], *, flash: bool, zero: int | None, tp: int, pp: int, precision: str) -> Software:
    """The software of a row. zero: the printed stage."""
    framework = str(row.get("framework") or "").lower()
    kind = next((kind for pattern, kind in KINDS if re.search(pattern, framework)), None)
    known = kind is not None
    if kind is None:  # what no name tells, the layout does: FSDP and DeepSpeed shard more, others wrote their own parallel layers
        kind = "plain" if tp * pp > 1 or zero is None or zero < 2 else "fsdp" if zero == 3 else "deepspeed"
    if kind == "deepspeed" and (tp * pp > 1 or not flash):
        kind = "megatron-deepspeed"  # DeepSpeed by itself has no tensor parallel layers and its pipelines were used with Megatron's
    year = year_of(row, flash=flash)
    stack = usual(kind, year=year, flash=flash, pp=pp, precision=precision)
    return Software(kind=kind, year=year, stack=_stated(stack, row, framework), known=known)


def year_of(row: Mapping[str, Any], *, flash: bool) -> int:
    """The year of the software: printed with the framework or source, that of an arXiv number, else that of the GPU."""
    for text in (str(row.get("framework") or ""), str(row.get("source") or ""), str(row.get("url") or "")):
        if found := re.search(r"\b(20(?:1[89]|2\d))\b", text):
            return int(found[1])
        if found := re.search(r"(?:arxiv[.:/]|abs/)(?:org/abs/)?(\d\d)\d\d\.\d{4,5}", text.lower()):
            return 2000 + int(found[1])
    hardware = row.get("hardware")
    gpu = str(hardware.get("gpu") or "").lower() if isinstance(hardware, Mapping) else ""
    named = next(
        (year for word, year in (("v100", 2020), ("b200", 2025), ("b300", 2025), ("h100", 2024), ("h200", 2024)) if word in gpu), 2023
    )
    return named if flash else min(named, 2022)


def usual(kind: str, *, year: int = 2024, flash: bool = True, pp: int = 1, precision: str = "bf16") -> Stack:
    """What software of a kind (those of KINDS, and "plain") does as a rule in a year."""
    old = year <= 2022
    if kind == "toolkit":
        return TOOLKIT
    if kind in ("megatron", "nemo"):
        # Megatron-LM: fp32 gradients added to inside the GEMM, its own fused kernels, vocab-parallel loss; Transformer Engine from 2023
        stack = Stack(
            name=kind,
            sharding="megatron",
            elementwise_fused=True,
            loss="cloned" if old else "parallel",
            gradients="fp32",
            gemm_accumulates=True,
            placeholders=year >= 2023 and flash,
            tp_overlap="half",
            dp_overlap=not old,
            p2p_overlap=False,
            kernel="cudnn" if year >= 2023 else "flash1",
            reduce_bytes=4.0,
            old_driver=old,
        )
        if not flash and old:  # Megatron-LM as of SC21: fp16 gradients, copied whole to fp32 for the step; nothing overlaps
            stack = replace(
                stack,
                gradients="16-bit" if precision == "fp16" else "fp32",
                gradient_copy=precision == "fp16",
                reduce_bytes=2.0,
                tp_overlap="none",
            )
        if kind == "nemo":  # user buffers, gradients reduced and kept in bf16, the fp32 master as bf16 weight plus remainder
            stack = replace(stack, tp_overlap="whole", p2p_overlap=True, gradients="16-bit", reduce_bytes=2.0, master="remainder")
        return stack
    if kind == "megatron-deepspeed":
        # Megatron-LM's layers; DeepSpeed reduces after the last micro-batch, and BF16_Optimizer keeps whole fp32 gradients beside the 16-bit ones
        whole = precision == "bf16" and pp > 1
        return Stack(
            name=kind,
            sharding="deepspeed",
            elementwise_fused=True,
            loss="cloned",
            gradients="fp32" if whole else "autograd",
            kernel="flash1" if old else "flash2",
            reduce_bytes=4.0 if whole else 2.0,
            single_ring=True,
            # its ZeRO-1 ignores contiguous gradients and falls back to all-reducing buckets (engine.py, _configure_zero_optimizer)
            whole_reduce=old or whole,
            single_sends=True,
            old_driver=old,
        )
    if (
        kind == "deepspeed"
    ):  # Hugging Face models: chains of PyTorch operators; overlap_comm is false below stage 3 (its configuration reference)
        return Stack(
            name=kind,
            sharding="deepspeed",
            norm_fused=False,
            gate_fused=False,
            loss="eager",
            softmax_fused=False,
            old_driver=old,
        )
    if kind == "fsdp":  # PyTorch's own RMSNorm kernel; gates fused by its compiler or written as chains
        return Stack(
            name=kind, sharding="fsdp", loss="compiled", dp_overlap=True, reduce_bytes=4.0 if year >= 2024 else 2.0, old_driver=old
        )
    # parallel layers written in plain PyTorch: fp32 norms, gate chains, the logits gathered and in fp32, fp32 gradients beside bf16 ones
    return Stack(
        name="plain",
        sharding="megatron",
        norm_fused=False,
        gate_fused=False,
        loss="eager",
        whole_logits=True,
        gradients="fp32" if precision == "bf16" else "autograd",
        softmax_fused=False,
        reduce_bytes=4.0 if precision == "bf16" else 2.0,
        dp_overlap=True,  # torch's DistributedDataParallel
        saved_gathers=True,
        old_driver=old,
    )


# what the public code of a framework does otherwise than its kind
_OTHERWISE: tuple[tuple[str, dict[str, Any]], ...] = (
    # llm-foundry: a fused cross entropy, LayerNorm in low precision
    (r"composer|foundry|mosaic", {"loss": "fused", "reduce_bytes": 2.0}),
    # torchtitan: gates and the loss as PyTorch operators, unless compiled
    (r"titan", {"gate_fused": False, "loss": "eager"}),
    # nanotron, models/llama.py: Triton's RMSNorm; functional.py: a sharded loss after Megatron's
    (r"nanotron", {"norm_fused": True, "whole_logits": False, "loss": "cloned"}),
    # InternEvo, hybrid_zero_optim.py: flat 2-byte and fp32 gradients, and single-tensor AdamW's two fp32 temporaries; Apex's RMSNorm,
    # a sharded loss, autograd's gradients
    (
        r"internevo",
        {"norm_fused": True, "gradients": "autograd", "whole_logits": False, "step_copies": 14.0, "saved_gathers": False},
    ),
    # Aleph-Alpha/scaling: after the last micro-batch bf16 gradients are all-reduced as fp32, bucket by bucket
    (r"aa-scaling|aleph", {"gradients": "autograd", "whole_reduce": True, "gate_reduces": True, "reduce_bytes": 4.0, "dp_overlap": False}),
)

# what the page that a row was read from says of all its runs on so many GPUs or more
_PAGES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    # section "dealing with JZ hanging": without CUDA_LAUNCH_BLOCKING=1 runs on 320 GPUs "always" hang, and it stays in use
    (r"tr11-176b-ml/chronicles-prequel", 320, {"blocking_launches": True}),
)


def _stated(stack: Stack, row: Mapping[str, Any], framework: str) -> Stack:
    """The switches that a row's own words set, or the page it was read from."""
    for pattern, switches in _OTHERWISE:
        if re.search(pattern, framework):
            stack = replace(stack, **switches)
    hardware = row.get("hardware")
    gpus = hardware.get("count") if isinstance(hardware, Mapping) else None
    for pattern, least, switches in _PAGES:
        if isinstance(gpus, int) and gpus >= least and re.search(pattern, str(row.get("url") or "").lower()):
            stack = replace(stack, **switches)
    flags = row.get("flags")
    flagged = " ".join(map(str, flags)).lower() if isinstance(flags, list) else ""
    printed = str(row.get("attention_as_printed") or "").lower()
    text = f"{framework} {printed} {flagged}"
    if re.search(r"rms ?(?:norm )?kernel|fused (?:rms ?)?norm|(?:rms|layer) ?norm (?:is )?fused|apex norm", text):
        stack = replace(stack, norm_fused=True)
    elif re.search(r"no(?:t|n)?[- ](?:fused |rms )(?:norm|kernel)|norms? not fused|unfused norm", text):
        stack = replace(stack, norm_fused=False)
    if "compile" in flagged:
        loss = stack.loss if stack.loss in ("fused", "parallel", "chunked") else "compiled"
        stack = replace(stack, norm_fused=True, gate_fused=True, elementwise_fused=True, loss=loss)
    if "liger" in text or "fused cross-entropy" in flagged:
        stack = replace(stack, norm_fused=True, gate_fused=True, loss="chunked")
    if "cross-entropy fusion" in flagged:
        stack = replace(stack, loss="fused")
    if re.search(r"async[_ ]?tp", flagged) or "custom overlap" in flagged:
        stack = replace(stack, tp_overlap="whole", p2p_overlap=True)
    if "overlap disabled" in flagged:
        stack = replace(stack, tp_overlap="none", dp_overlap=False, p2p_overlap=False)
    if "parallel block" in flagged:
        stack = replace(stack, parallel_block=True)
    if re.search(r"\btorch\b|eager|naive", printed):
        stack = replace(stack, softmax_fused=False)
    elif "fused softmax" in printed:
        stack = replace(stack, softmax_fused=True)
    return stack
