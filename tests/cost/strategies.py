"""Workloads and hardware that hypothesis draws from: legal shapes and layouts, small enough to reason about."""

from __future__ import annotations

from hypothesis import strategies as st

from toolkit.arch.spec import ModelSpec
from toolkit.cost.stack import TOOLKIT, Stack
from toolkit.cost.workload import Workload
from toolkit.evidence.software import usual

DEEPSPEED, FSDP, MEGATRON, NEMO, PLAIN = (usual(kind) for kind in ("deepspeed", "fsdp", "megatron", "nemo", "plain"))
OLD_MEGATRON = usual("megatron", year=2021, flash=False, precision="fp16")
OLD_PIPELINES = usual("megatron-deepspeed", year=2022, flash=False, pp=4, precision="bf16")
STACKS: tuple[Stack, ...] = (DEEPSPEED, FSDP, MEGATRON, NEMO, PLAIN, OLD_MEGATRON, OLD_PIPELINES, TOOLKIT)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    heads = draw(st.sampled_from((8, 16, 32)))
    head_dim = draw(st.sampled_from((64, 128)))
    gated = draw(st.booleans())
    rows = 1024 * draw(st.integers(1, 128))
    biases = not gated
    return ModelSpec(
        layers=8 * draw(st.integers(1, 6)),
        hidden=heads * head_dim,
        heads=heads,
        groups=draw(st.sampled_from((8, heads))),
        head_dim=head_dim,
        ffn=1024 * draw(st.integers(1, 16)),
        gated=gated,
        norm="rms" if gated else "layer",
        vocab=rows,
        rows=rows,
        tied=draw(st.booleans()),
        positions=0 if gated else 2048,
        qkv_bias=biases,
        proj_bias=biases,
        mlp_bias=biases,
        norm_bias=biases,
        dropout=draw(st.booleans()),
    )


@st.composite
def workloads(draw: st.DrawFn, *, stack: Stack | None = None) -> Workload:
    tp, pp, cp, dp = (draw(st.sampled_from(choices)) for choices in ((1, 2, 8), (1, 2, 4), (1, 2), (1, 4, 16)))
    micro = draw(st.integers(1, 4))
    return Workload(
        model=draw(specs()),
        seq=512 * draw(st.integers(1, 16)),
        micro=micro,
        batch=micro * dp * draw(st.integers(1, 16)),
        tp=tp,
        pp=pp,
        vpp=draw(st.sampled_from((1, 2))) if pp > 1 else 1,
        cp=cp,
        dp=dp,
        sp=draw(st.booleans()) and tp > 1,
        zero=draw(st.integers(0, 3)),
        offload_optimizer=draw(st.sampled_from(("none", "cpu", "nvme"))),
        recompute=draw(st.sampled_from(("none", "selective", "full", "half", "alternate"))),
        precision=draw(st.sampled_from(("bf16", "fp16", "fp32"))),
        flash=draw(st.booleans()),
        stack=stack or draw(st.sampled_from(STACKS)),
    )
