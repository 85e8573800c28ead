"""This rank's stage of the model: megatron-core GPTModel chunks with layout-invariant weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.overrides import TorchFunctionMode

from toolkit.arch.spec import WeightSpec
from toolkit.config.schema import ModelSection, RopeScaling, RunConfig
from toolkit.model.head import Head
from toolkit.model.init import materialise
from toolkit.model.layers import TIED_COPY, local_spec, mark_tensor_parallel, mask_padding, te_spec
from toolkit.model.on_host import keep_on_host
from toolkit.parallel.exchange import chosen_exchange
from toolkit.parallel.layout import Layout, split_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in the tanh form that GPT-2 and GPT-3 were trained with."""
    return F.gelu(x, approximate="tanh")


def transformer_config(config: RunConfig, layout: Layout) -> TransformerConfig:
    """megatron-core's config for this run; every value follows from the YAML."""
    m, t = config.model, config.train
    spec = m.spec
    dtype = DTYPES[t.precision]
    interleaved = layout.vpp > 1
    uneven = layout.pp > 1 and bool(layout.layers_per_stage)
    split = (0, 0) if uneven else split_layers(m.num_layers, layout.pp * layout.vpp)
    assert split is not None, "the rules refuse it"
    modes: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    settings = TransformerConfig(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups,
        kv_channels=m.head_dim,
        ffn_hidden_size=m.ffn_hidden_size,
        hidden_dropout=m.dropout,
        attention_dropout=m.dropout,
        normalization="RMSNorm" if spec.norm == "rms" else "LayerNorm",
        layernorm_epsilon=m.norm_eps,
        qk_layernorm=spec.qk_norm,
        gated_linear_unit=spec.gated,
        activation_func={"swiglu": F.silu, "gelu": F.gelu}.get(str(m.activation), gelu_tanh),
        add_bias_linear=spec.proj_bias,
        add_qkv_bias=spec.qkv_bias,
        softmax_scale=softmax_scale(m),
        init_method_std=m.init_std,
        perform_initialization=True,  # on the meta device: only for the attributes it sets
        use_cpu_initialization=False,
        init_model_with_meta_device=True,  # for Transformer Engine, which would give every weight memory at once
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if interleaved else None,
        pipeline_model_parallel_layout=_pipeline_layout(layout) if uneven else None,
        account_for_loss_in_pipeline_split=split[1] > 0,
        account_for_embedding_in_pipeline_split=split[1] > 1,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=t.precision == "bf16",
        fp16=t.precision == "fp16",
        # with two stages, batched sends of different chunks between the same two ranks cross
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,  # a synchronisation of the device after every message, for PyTorch before 1.13
        # gloo still reads an output that is being sent when the schedule frees it; NCCL orders the two
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **modes[t.recompute],
    )
    # switches that megatron-core does not have, for the layers of toolkit.model.layers
    settings.mlp_bias, settings.norm_bias = spec.mlp_bias, spec.norm_bias
    if layout.cp > 1:
        settings.cp_exchange = chosen_exchange(config).name
        settings.cp_comm_type = {"allgather": "all_gather", "ulysses": "a2a", "ring": "p2p"}[settings.cp_exchange]  # Transformer Engine's
    return settings


def _pipeline_layout(layout: Layout) -> list[list[str]]:
    """What each stage holds, in megatron-core's words."""
    stages = [["decoder"] * layers for layers in layout.layers_per_stage]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


class Rotary(RotaryEmbedding):
    """Rotary angles at given positions, [1 or b, s]; at 0, 1, 2 … where none are given."""

    positions: Tensor | None = None

    def forward(self, max_seq_len: int, *args: Any, **kwargs: Any) -> Tensor:
        """Angles [s, 1 or b, 1, d] in fp32."""
        if self.positions is None:
            return super().forward(max_seq_len, *args, **kwargs)  # type: ignore[no-any-return]
        angles = self.positions.t().to(self.inv_freq).unsqueeze(-1) * self.inv_freq  # [s, b, d / 2]
        return torch.cat((angles, angles), dim=-1).unsqueeze(2)


class StageModel(GPTModel):
    """GPTModel whose tied copies are made equal by drawing both from the same name, not by a message.

    Where documents are kept apart (an attention_mask is given, see SdpaAttention) or ranks share a
    sequence, rotary positions are those that are given too.
    """

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(rotary := getattr(self, "rotary_pos_emb", None), Rotary):
            shared = self.config.context_parallel_size > 1  # a part of the sequence, in an order of its own
            rotary.positions = position_ids if attention_mask is not None else position_ids[:1] if shared else None
        labels, head = kwargs.get("labels"), getattr(self, "output_layer", None)
        if labels is not None and isinstance(head, Head) and head.in_chunks(labels):
            head.labels = labels
        return super().forward(input_ids, position_ids, attention_mask, *args, **kwargs)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Per-token losses [b, s] in fp32. logits: [s, b, v/tp], or the losses [s, b] of a Head
        that computed them in chunks.
        """
        if logits.dim() == 2:
            return logits.t().contiguous()
        return super().compute_language_model_loss(labels, logits)  # type: ignore[no-any-return]

    def setup_embeddings_and_output_layer(self) -> None:
        if self.share_embeddings_and_output_weights and self.post_process and not self.pre_process:
            setattr(self.output_layer.weight, TIED_COPY, True)


class _ParametersOnMeta(TorchFunctionMode):
    """While a model is built: torch.empty, which weights come from, takes no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_chunks(
    config: RunConfig,
    layout: Layout,
    *,
    device: torch.device,
    partition: Callable[[torch.nn.Parameter], None] | None = None,
    blank: bool = False,
    read: Callable[[WeightSpec], Tensor] | None = None,
    leave: Callable[[WeightSpec], bool] | None = None,
) -> list[GPTModel]:
    """The chunks of this rank's stage, initialised; process groups must be up.

    partition: called on each parameter once it has its value (ZeRO-3 frees all but its part there).
    blank: weights are 0, for a checkpoint's to be read into. read: gives this rank's part of a
    weight, instead of an initial value. leave: which weights stay without memory.
    """
    m = config.model
    assert m.vocab_size is not None, "the vocabulary is known once the data is resolved"
    weights = m.spec
    settings = transformer_config(config, layout)
    chunks: list[GPTModel] = []
    stage = parallel_state.get_pipeline_model_parallel_rank()
    for chunk in range(layout.vpp):
        first = stage == 0 and chunk == 0
        last = stage == layout.pp - 1 and chunk == layout.vpp - 1
        layers = len(layout.layers_of(m.num_layers, stage=stage, chunk=chunk))
        spec = te_spec(settings) if m.impl == "te" else local_spec(settings, num_layers=layers)
        with _ParametersOnMeta():
            model = StageModel(
                settings,
                spec,
                weights.rows,
                m.max_position_embeddings,
                pre_process=first,
                post_process=last,
                share_embeddings_and_output_weights=weights.tied,
                position_embedding_type="rope" if weights.rotary else "learned_absolute",
                rotary_base=m.rope_theta,  # type: ignore[arg-type]  # a float is what Llama needs
                vp_stage=chunk if layout.vpp > 1 else None,
            )
        if weights.rotary:
            model.rotary_pos_emb = Rotary(weights.head_dim, 1.0)
            model.rotary_pos_emb.inv_freq = rope_frequencies(m, device=device)
        materialise(
            model,
            weights,
            seed=config.run.seed,
            std=m.init_std,
            tp=layout.tp,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            dtype=DTYPES[config.train.precision],
            device=device,
            partition=partition,
            blank=blank,
            read=read,
            leave=leave,
        )
        if last:
            mask_padding(model.output_layer, vocab_size=weights.vocab, rows=weights.rows)
            model.output_layer.__class__ = Head  # megatron-core has no place to name another class
            model.output_layer.prepare(mode=config.train.chunked_loss, vocab_size=weights.vocab)
        mark_tensor_parallel(model, weights, sequence_parallel=layout.sequence_parallel)
        model.train()
        if config.train.offload_activations:
            keep_on_host(model.decoder)
        if m.compile:
            for layer in model.decoder.layers:
                layer.compile(dynamic=False)
        chunks.append(model)
    return chunks


def softmax_scale(model: ModelSection) -> float | None:
    """What attention multiplies scores by; None: the usual 1 / sqrt(head_dim). Yarn scales queries
    and keys, so scores twice.
    """
    scaling = model.rope_scaling
    if scaling is None or scaling.type != "yarn":
        return None
    assert model.head_dim is not None
    factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return float(factor**2 / model.head_dim**0.5)


def rope_frequencies(model: ModelSection, *, device: torch.device) -> Tensor:
    """Inverse wavelengths of RoPE, [head_dim / 2] in fp32, scaled as Hugging Face's `linear`,
    `llama3` or `yarn`.

    Sources: of llama3 the Llama 3.1 reference implementation's apply_scaling; of yarn arXiv
    2309.00071, section 3.2.
    """
    assert model.head_dim is not None
    exponent = torch.arange(0, model.head_dim, 2, dtype=torch.float32, device=device) / model.head_dim
    inverse = 1.0 / (model.rope_theta**exponent)
    scaling: RopeScaling | None = model.rope_scaling
    if scaling is None:
        return inverse
    if scaling.type == "linear":
        return inverse / scaling.factor
    context = scaling.original_max_position_embeddings
    if scaling.type == "yarn":
        # the dimension whose angle turns so many times within the context, in pairs and whole ones
        fast, slow = (
            model.head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(model.rope_theta))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), model.head_dim - 1)
        place = torch.arange(model.head_dim // 2, dtype=torch.float32, device=device)
        stretch = ((place - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
        return (1 - stretch) * inverse + stretch * inverse / scaling.factor
    wavelength = 2 * math.pi / inverse
    # 1 where wavelengths are short and stay, 0 where they are long and stretch by the factor
    keep = (context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * inverse / scaling.factor + keep * inverse
