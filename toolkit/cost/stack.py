"""What a training framework does that costs time or memory, as switches: what it fuses, keeps, reduces and overlaps.

Each switch is a fact about code, the same for every run of it. toolkit/evidence/software.py chooses them for published runs,
from what a row says and what was usual in its year; TOOLKIT and TOOLKIT_TE are this project's own engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from toolkit.cost.constants import VALUES

Sharding = Literal["megatron", "deepspeed", "fsdp", "toolkit"]
# bytes alive per logit at the loss's peak, and bytes moved per logit:
LOSSES = {
    "fused": (4.0, 12.0),  # one kernel over 16-bit logits that writes their gradient in their place (Apex's, TE's cross entropy)
    "parallel": (8.0, 30.0),  # Megatron's vocab-parallel loss: 16-bit logits, an fp32 copy that becomes the softmax, a 16-bit gradient
    "cloned": (10.0, 40.0),  # the same before its in-place subtraction (Megatron-LM, cross_entropy.py up to 2022)
    "compiled": (12.0, 40.0),  # torch.compile: 16-bit logits, fp32 log-softmax and gradient, 16-bit gradient
    "eager": (16.0, 60.0),  # PyTorch: 16-bit logits, their fp32 copy, its log-softmax, their fp32 gradient, and its 16-bit cast
    "chunked": (16.0, 40.0),  # Liger's fused linear cross entropy: as eager, for a few thousand rows at a time
}


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One framework's behaviour.

    sharding: whose rules place parameters, gradients and optimizer states;
    norm_fused, gate_fused: RMSNorm, or rotary embedding and the gated activation, are single kernels (Transformer Engine, Apex,
    Triton, torch.compile) and not chains of PyTorch operators;
    elementwise_fused: bias, dropout, residual additions, casts and layout copies run in the kernels beside them;
    graphed: kernels are launched by CUDA graphs or C++ schedulers, not one by one from Python;
    loss: how the cross entropy is computed, a key of LOSSES; whole_logits: logits are gathered over TP before it;
    gradients: "autograd": as autograd leaves them, in the weights' precision; "fp32", "16-bit": whole buffers of that precision
    that micro-batches add to; gemm_accumulates: they are added to inside the weight GEMM, so that autograd's own never exist;
    placeholders: Transformer Engine hands autograd one dummy weight gradient per weight shape, kept for good;
    master: "fp32": an fp32 master weight and two moments; "remainder": the master shares its upper half with the 16-bit weight;
    gradient_copy: the optimizer keeps a whole fp32 copy of the gradients for its step (Megatron-LM's Float16Optimizer of 2021);
    step_copies: bytes a sharded parameter of flat copies that live across the optimizer step;
    tp_overlap: "none"; "half": the backward's reduction runs beside the weight gradient; "whole": user buffers, async TP;
    dp_overlap, p2p_overlap: gradients are reduced during the backward; pipeline sends run beside compute;
    kernel: the attention kernel it uses where the GPU has it; softmax_fused: without one, scale, mask and softmax are one kernel;
    reduce_bytes: bytes a gradient on the wire, at least those of the weights; single_ring: gathers use one network port of a node;
    saved_gathers: under sequence parallelism the gathered inputs of the weight multiplies are kept for the backward;
    whole_reduce: ZeRO-1 all-reduces whole gradients; gate_reduces: without sequence parallelism the two multiplies of a gated MLP
    each all-reduce their input's gradient; split_sends: pipeline sends of equal tensors are split over TP (arXiv 2104.04473, 4.1);
    blocking_launches: each kernel is waited for before the next one is launched (CUDA_LAUNCH_BLOCKING=1);
    single_sends: a stage's sends and receives run one after the other (DeepSpeed, runtime/pipe/schedule.py: one instruction each);
    parallel_block: attention and MLP read one norm, and their results are added and reduced together;
    old_driver: CUDA before 11.7 and NCCL before 2.14: all kernels loaded, every peer of a communicator given its buffers.
    """

    name: str
    sharding: Sharding
    norm_fused: bool = True
    gate_fused: bool = True
    elementwise_fused: bool = False
    graphed: bool = False
    loss: str = "cloned"
    whole_logits: bool = False
    gradients: Literal["autograd", "fp32", "16-bit"] = "autograd"
    gemm_accumulates: bool = False
    placeholders: bool = False
    master: Literal["fp32", "remainder"] = "fp32"
    gradient_copy: bool = False
    step_copies: float = 0.0
    tp_overlap: Literal["none", "half", "whole"] = "none"
    dp_overlap: bool = False
    p2p_overlap: bool = False
    kernel: str = "flash2"
    softmax_fused: bool = True
    reduce_bytes: float = 2.0
    single_ring: bool = False
    saved_gathers: bool = False
    whole_reduce: bool = False
    gate_reduces: bool = False
    split_sends: bool = True
    blocking_launches: bool = False
    single_sends: bool = False
    parallel_block: bool = False
    old_driver: bool = False

    @property
    def chunked_loss(self) -> bool:
        return self.loss == "chunked"

    @property
    def logit_bytes(self) -> float:
        return LOSSES[self.loss][0]

    @property
    def loss_passes(self) -> float:
        return LOSSES[self.loss][1]

    @property
    def passes(self) -> float:
        """Memory-bound traffic of a layer over that of the fewest kernels."""
        return VALUES.fused_traffic if self.elementwise_fused else VALUES.eager_traffic

    @property
    def main_grads(self) -> float:
        """Bytes a weight of the whole gradient buffers that micro-batches add to; 0 without them."""
        return {"autograd": 0.0, "16-bit": 2.0, "fp32": 4.0}[self.gradients]

    @property
    def master_bytes(self) -> float:
        """Optimizer bytes a weight in mixed precision: fp32 master and two moments (arXiv 1910.02054, section 3.1)."""
        return (10.0 if self.master == "remainder" else 12.0) + (4.0 if self.gradient_copy else 0.0)

    @property
    def tp_hidden(self) -> float:
        """Share of tensor-parallel traffic that compute hides."""
        return {"none": 0.0, "half": VALUES.half_hidden, "whole": VALUES.whole_hidden}[self.tp_overlap]

    @property
    def dp_hidden(self) -> float:
        """Share of a pass's compute beside which gradients can be reduced or weights gathered."""
        return VALUES.sharded_hidden if self.dp_overlap else 0.0

    @property
    def p2p_hidden(self) -> float:
        """Share of the pipeline's sends that compute hides."""
        return VALUES.sharded_hidden if self.p2p_overlap else 0.0

    @property
    def zero3_hidden(self) -> float:
        """Share of a pass's compute beside which ZeRO-3's and FSDP's prefetched traffic runs."""
        return VALUES.sharded_hidden


# this project: megatron-core layers without Transformer Engine, PyTorch SDPA, flat fp32 gradients at ZeRO-0/1
TOOLKIT = Stack(
    name="toolkit",
    sharding="toolkit",
    gate_fused=False,
    loss="parallel",
    gradients="fp32",
    gemm_accumulates=True,
    tp_overlap="half",
    reduce_bytes=4.0,
)
TOOLKIT_TE = replace(TOOLKIT, name="toolkit-te", gate_fused=True, kernel="cudnn")
