"""What a training framework does that costs time or memory: which states it keeps, what it fuses, what it hides."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

Sharding = Literal["megatron", "deepspeed", "fsdp", "toolkit"]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One framework's behaviour; facts about code, the same for every run of it.

    sharding: whose rules place parameters, gradients and optimizer states;
    norm_chain, gate_chain: RMSNorm, or rotary embedding and the gated activation, run as chains of PyTorch operators
    rather than as single kernels (Transformer Engine, torch.compile, Triton);
    passes: memory-bound traffic of a layer over that of the fewest kernels: casts, layout copies, two-pass norm gradients
    of PyTorch's own operators;
    main_grads: bytes a parameter of whole gradients kept across micro-batches and added to inside the weight GEMM
    (0: gradients are those of autograd, in the weights' precision);
    placeholders: Transformer Engine hands autograd one dummy weight gradient per weight shape, kept for good;
    master_bytes: optimizer bytes a parameter in mixed precision: fp32 master and two moments, 10 where the master
    shares its upper half with the bf16 weight;
    step_copies: bytes a sharded parameter of flat copies that live across the optimizer step;
    logit_bytes, loss_passes: bytes alive per logit at the loss's peak, and bytes moved per logit;
    tp_hidden, dp_hidden, p2p_hidden, zero3_hidden: share of compute that tensor-, data-, pipeline-parallel and ZeRO-3 traffic
    can run beside;
    kernel: the attention kernel it uses where the GPU has it;
    reduce_bytes: bytes a gradient on the wire, at least those of the weights; single_ring: gathers use one network port of a node;
    whole_logits: the output layer's result is gathered over TP before the loss; saved_gathers: under sequence parallelism the gathered
    inputs of the weight multiplies are kept for the backward instead of gathered again; whole_reduce: ZeRO-1 all-reduces whole gradients;
    gate_reduces: without sequence parallelism the two multiplies of a gated MLP each all-reduce their input's gradient;
    split_sends: pipeline sends of equal tensors are split over TP (the scatter-gather of arXiv 2104.04473, section 4.1).
    """

    name: str
    sharding: Sharding
    norm_chain: bool = False
    gate_chain: bool = False
    passes: float = 1.8
    main_grads: float = 0.0
    placeholders: bool = False
    master_bytes: float = 12.0
    step_copies: float = 0.0
    chunked_loss: bool = False
    logit_bytes: float = 10.0
    loss_passes: float = 40.0
    tp_hidden: float = 0.2
    dp_hidden: float = 0.9
    p2p_hidden: float = 0.0
    zero3_hidden: float = 0.9
    kernel: str = "flash2"
    softmax_fused: bool = True
    reduce_bytes: float = 2.0
    single_ring: bool = False
    split_sends: bool = True
    whole_logits: bool = False
    saved_gathers: bool = False
    whole_reduce: bool = False
    gate_reduces: bool = False


MEGATRON = Stack(
    name="megatron",
    sharding="megatron",
    passes=1.2,
    main_grads=4.0,
    placeholders=True,
    kernel="cudnn",
    logit_bytes=8.0,
    reduce_bytes=4.0,
    loss_passes=30.0,
)
# tensor-parallel overlap through userbuffers; gradients reduced and kept in bf16, fp32 master as bf16 weight plus remainder
NEMO = replace(MEGATRON, name="nemo", tp_hidden=0.8, p2p_hidden=0.9, main_grads=2.0, reduce_bytes=2.0, master_bytes=10.0)
# before flash attention: nothing overlaps, fp16 gradients with an fp32 copy for the step
MEGATRON_2021 = replace(
    MEGATRON,
    name="megatron-2021",
    kernel="flash1",
    tp_hidden=0.0,
    dp_hidden=0.0,
    main_grads=2.0,
    master_bytes=16.0,
    reduce_bytes=2.0,
    placeholders=False,
)
MEGATRON_FORK = replace(
    MEGATRON,
    name="megatron-fork",
    passes=1.8,
    kernel="flash2",
    tp_hidden=0.0,
    main_grads=0.0,
    reduce_bytes=2.0,
    placeholders=False,
    gate_chain=True,
    logit_bytes=16.0,
)
# its public code (Aleph-Alpha/scaling): norms gather the sequence, the output layer gathers its logits, and after the last micro-batch
# bf16 gradients are all-reduced as fp32, bucket by bucket
AA_SCALING = replace(
    MEGATRON_FORK,
    name="aa-scaling",
    whole_logits=True,
    saved_gathers=True,
    whole_reduce=True,
    gate_reduces=True,
    dp_hidden=0.0,
    reduce_bytes=4.0,
)
# its hybrid optimizer holds flat 2-byte and fp32 gradients, and single-tensor AdamW two fp32 temporaries, over the step
INTERNEVO = replace(MEGATRON_FORK, name="internevo", step_copies=14.0)
DEEPSPEED = Stack(
    name="deepspeed",
    sharding="deepspeed",
    norm_chain=True,
    gate_chain=True,
    logit_bytes=16.0,
    loss_passes=60.0,
    zero3_hidden=0.8,
    softmax_fused=False,
)
DEEPSPEED_MEGATRON = replace(
    DEEPSPEED,
    name="ds-megatron",
    norm_chain=False,
    gate_chain=False,
    logit_bytes=10.0,
    loss_passes=40.0,
    tp_hidden=0.0,
    dp_hidden=0.0,
    kernel="flash1",
    softmax_fused=True,
    single_ring=True,
    split_sends=False,
)
FSDP = Stack(name="fsdp", sharding="fsdp", logit_bytes=12.0, loss_passes=40.0)
FOUNDRY = replace(FSDP, name="llm-foundry", logit_bytes=4.0, loss_passes=12.0)  # fused cross-entropy, LayerNorm in low precision
TORCHTITAN = replace(FSDP, name="torchtitan", gate_chain=True, reduce_bytes=4.0, logit_bytes=14.0)
# this project: megatron-core layers without Transformer Engine, PyTorch SDPA, flat fp32 gradients at ZeRO-0/1
TOOLKIT = Stack(
    name="toolkit", sharding="toolkit", norm_chain=False, gate_chain=True, main_grads=4.0, logit_bytes=8.0, reduce_bytes=4.0, dp_hidden=0.0
)
TOOLKIT_TE = replace(TOOLKIT, name="toolkit-te", gate_chain=False, kernel="cudnn")

_NAMES = (
    (r"nemo|megatron-?bridge", NEMO),
    (r"megatron.*deepspeed|deepspeed.*megatron|neox", DEEPSPEED_MEGATRON),
    (r"deepspeed|colossal", DEEPSPEED),
    (r"titan", TORCHTITAN),
    (r"composer|foundry|mosaic", FOUNDRY),
    (r"fsdp|litgpt|lit-gpt|olmo|fairscale", FSDP),
    (r"internevo", INTERNEVO),
    (r"aa-scaling|aleph", AA_SCALING),
    (r"megatron|mcore|mlperf", MEGATRON),
    (r"hugging|transformers|\bhf\b|accelerate|llama-?factory|axolotl|unsloth|trl", DEEPSPEED),
    (r"toolkit", TOOLKIT),
)


def stack_named(framework: str | None, *, flash: bool = True, zero: int = 1, tp: int = 1, pp: int = 1) -> Stack:
    """The stack a framework's printed name means; by its layout where the name says nothing."""
    text = (framework or "").lower()
    found = next((stack for pattern, stack in _NAMES if re.search(pattern, text)), None)
    if found is None:
        found = MEGATRON_FORK if tp * pp > 1 or zero < 2 else FSDP if zero == 3 else DEEPSPEED
    if found is MEGATRON and not flash:
        return MEGATRON_2021
    if found is DEEPSPEED and not flash:
        return DEEPSPEED_MEGATRON
    return found
