"""The models are Llama and GPT-2: with the same weights, logits equal those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.pool import Pool
from toolkit.config.load import parse_config

pytest.importorskip("transformers")

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "num_query_groups": 2, "ffn_hidden_size": 96},
    "llama-mha-tied": {"family": "llama", "ffn_hidden_size": 96, "tie_embeddings": True},
    "llama-head-dim": {"family": "llama", "num_query_groups": 1, "ffn_hidden_size": 96, "head_dim": 24, "rope_theta": 500000.0},
    "llama-rope-llama3": {"family": "llama", "num_query_groups": 2, "ffn_hidden_size": 96, "rope_scaling": {"type": "llama3", **LLAMA3}},
    "llama-rope-yarn": {
        "family": "llama",
        "num_query_groups": 2,
        "ffn_hidden_size": 96,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "llama-rope-linear": {
        "family": "llama",
        "num_query_groups": 2,
        "ffn_hidden_size": 96,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "gpt2": {"family": "gpt", "tie_embeddings": True},
}


def largest_difference(variant: dict[str, Any]) -> tuple[float, float]:
    """(largest logit difference, largest logit) between our model and transformers', in a worker."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from toolkit.model.build import build_chunks
    from toolkit.parallel.layout import Layout
    from toolkit.train.world import World, connect

    shape = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "init_std": 0.1,
    }
    config = parse_config({"model": {**shape, **variant}, "train": {"seq_length": 48, "precision": "fp32"}})
    m = config.model
    connect(World(0, 1, 0), Layout(), seed=1)
    (ours,) = build_chunks(config, Layout(), device=torch.device("cpu"))
    for p in ours.parameters():
        if p.dim() == 1:  # biases and norm weights that are not all 0 or 1
            p.data += 0.1 * torch.randn(p.shape)
    if m.family == "llama":
        scaling = {"rope_type": "default"} if m.rope_scaling is None else {"rope_type": m.rope_scaling.type, **variant["rope_scaling"]}
        scaling.pop("type", None)
        theirs: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128,
                hidden_size=64,
                intermediate_size=m.ffn_hidden_size,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=m.num_query_groups,
                head_dim=m.head_dim,
                max_position_embeddings=64,
                rms_norm_eps=m.norm_eps,
                rope_parameters={"rope_theta": m.rope_theta, **scaling},
                tie_word_embeddings=m.tie_embeddings,
            )
        )
        theirs.load_state_dict(_llama_names(ours.state_dict(), m), strict=not m.tie_embeddings)
    else:
        theirs = GPT2LMHeadModel(
            GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        )
        theirs.load_state_dict(_gpt2_names(ours.state_dict(), m), strict=False)
        theirs.tie_weights()
    tokens = torch.randint(0, 128, (2, 48))
    with torch.no_grad():
        a = ours.eval()(tokens, torch.arange(48).expand(2, -1), None)
        b = theirs.eval()(tokens).logits
    return float((a - b).abs().max()), float(b.abs().max())


def _split_qkv(weight: torch.Tensor, m: Any) -> list[torch.Tensor]:
    """Rows are, per query group, [q heads, k, v]."""
    groups, d, per = m.num_query_groups, m.head_dim, m.num_attention_heads // m.num_query_groups
    blocks = weight.view(groups, per + 2, d, *weight.shape[1:])
    return [part.reshape(-1, *weight.shape[1:]) for part in (blocks[:, :per], blocks[:, per], blocks[:, per + 1])]


def _llama_names(state: dict[str, torch.Tensor], m: Any) -> dict[str, torch.Tensor]:
    found = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"],
        "model.norm.weight": state["decoder.final_layernorm.weight"],
    }
    found["lm_head.weight"] = found["model.embed_tokens.weight"] if m.tie_embeddings else state["output_layer.weight"]
    for i in range(m.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        qkv = _split_qkv(state[ours + "self_attention.linear_qkv.weight"], m)
        found |= {f"{theirs}self_attn.{n}_proj.weight": w for n, w in zip("qkv", qkv, strict=True)}
        found[theirs + "self_attn.o_proj.weight"] = state[ours + "self_attention.linear_proj.weight"]
        gate, up = state[ours + "mlp.linear_fc1.weight"].chunk(2)
        found |= {f"{theirs}mlp.gate_proj.weight": gate, f"{theirs}mlp.up_proj.weight": up}
        found[theirs + "mlp.down_proj.weight"] = state[ours + "mlp.linear_fc2.weight"]
        found[theirs + "input_layernorm.weight"] = state[ours + "input_layernorm.weight"]
        found[theirs + "post_attention_layernorm.weight"] = state[ours + "pre_mlp_layernorm.weight"]
    return found


def _gpt2_names(state: dict[str, torch.Tensor], m: Any) -> dict[str, torch.Tensor]:
    found = {
        "transformer.wte.weight": state["embedding.word_embeddings.weight"],
        "transformer.wpe.weight": state["embedding.position_embeddings.weight"],
    }
    for kind in ("weight", "bias"):
        found[f"transformer.ln_f.{kind}"] = state[f"decoder.final_layernorm.{kind}"]
    for i in range(m.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"transformer.h.{i}."
        for kind in ("weight", "bias"):
            qkv = torch.cat(_split_qkv(state[f"{ours}self_attention.linear_qkv.{kind}"], m))
            linears = {"attn.c_attn": qkv, "attn.c_proj": state[f"{ours}self_attention.linear_proj.{kind}"]}
            linears |= {"mlp.c_fc": state[f"{ours}mlp.linear_fc1.{kind}"], "mlp.c_proj": state[f"{ours}mlp.linear_fc2.{kind}"]}
            found |= {f"{theirs}{name}.{kind}": w.t() if kind == "weight" else w for name, w in linears.items()}
            found[f"{theirs}ln_1.{kind}"] = state[f"{ours}input_layernorm.{kind}"]
            found[f"{theirs}ln_2.{kind}"] = state[f"{ours}pre_mlp_layernorm.{kind}"]
    return found


@pytest.mark.parametrize("variant", [pytest.param(v, id=k) for k, v in VARIANTS.items()])
def test_logits_equal_transformers(pool: Pool, variant: dict[str, Any]) -> None:
    difference, scale = pool.run("tests.model.test_against_transformers:largest_difference", 1, variant, deadline_s=120)[0]
    assert scale > 0.5 and difference <= 1e-5 * max(scale, 1.0)
