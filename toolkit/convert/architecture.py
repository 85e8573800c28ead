"""config.json of Hugging Face and model_args of nanoGPT to our model section, and back; needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from toolkit.config.schema import ModelSection
from toolkit.errors import ConvertError

ARCHITECTURES = {"LlamaForCausalLM": "llama", "GPT2LMHeadModel": "gpt2"}
_TYPES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}
_GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


class _Keys:
    """A foreign config whose values are asked for by name and type; errors name the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def number(self, name: str, default: float | None = None, *, kind: type = int) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and value != int(value)) or value < 0:
            raise ConvertError(f"{self.where} has {name}={value!r}", why="a number belongs there", fix="Correct the file.")
        return kind(value)

    def only(self, name: str, allowed: tuple[Any, ...], why: str) -> Any:
        """A value that must be one of those that the model here can have, the first where there is none."""
        value = self.values.get(name)
        value = allowed[0] if value is None else value
        if value not in allowed:
            choice = " or ".join(repr(a) for a in allowed)
            raise ConvertError(f"{self.where} has {name}={value!r}", why=why, fix=f"Only models with {name}={choice} can be imported.")
        return value


def table_of(config: Mapping[str, Any], *, where: str) -> str:
    """The table that a config.json's model is converted by; ConvertError names the nearest architecture that has one."""
    names = config.get("architectures") or [_TYPES.get(str(config.get("model_type")), str(config.get("model_type")))]
    known = [n for n in names if n in ARCHITECTURES]
    if known:
        return ARCHITECTURES[known[0]]
    near = get_close_matches(str(names[0]), ARCHITECTURES, n=1, cutoff=0.5)
    raise ConvertError(
        f"{where} is of a {', '.join(map(str, names))}",
        why="its layers are not those of a model here" + (f"; the nearest one that is supported is {near[0]}" if near else ""),
        fix=f"Supported are {', '.join(ARCHITECTURES)}, and nanoGPT's ckpt.pt.",
    )


def model_section(table: str, config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The keys of our model section; raises ConvertError for what the model here does not compute."""
    return _READERS[table](_Keys(config, where))


def _llama(c: _Keys) -> dict[str, Any]:
    c.only("hidden_act", ("silu",), "its MLP has another activation than SwiGLU")
    heads = c.number("num_attention_heads", 32)
    head_dim = c.values.get("head_dim")
    section: dict[str, Any] = {
        "family": "llama",
        "num_layers": c.number("num_hidden_layers", 32),
        "hidden_size": c.number("hidden_size", 4096),
        "num_attention_heads": heads,
        "num_query_groups": c.number("num_key_value_heads", heads),
        "ffn_hidden_size": c.number("intermediate_size", 11008),
        "vocab_size": c.number("vocab_size", 32000),
        "max_position_embeddings": c.number("max_position_embeddings", 2048),
        "tie_embeddings": bool(c.values.get("tie_word_embeddings", False)),
        "norm_eps": c.number("rms_norm_eps", 1e-6, kind=float),
        "init_std": c.number("initializer_range", 0.02, kind=float) or 0.02,
        "attention_bias": bool(c.values.get("attention_bias", False)),
        "mlp_bias": bool(c.values.get("mlp_bias", False)),
    }
    if head_dim is not None:
        section["head_dim"] = c.number("head_dim")
    return section | _rope(c)


def _rope(c: _Keys) -> dict[str, Any]:
    """Transformers 5 has rope_parameters; before it, rope_theta and rope_scaling, whose key was first type and then rope_type."""
    inner = _Keys(c.values.get("rope_parameters") or c.values.get("rope_scaling") or {}, f"{c.where}'s rope parameters")
    theta = inner.number("rope_theta", c.number("rope_theta", 10000.0, kind=float), kind=float)
    kind = inner.values.get("rope_type", inner.values.get("type")) or "default"
    found: dict[str, Any] = {"rope_theta": theta}
    if kind == "linear":
        found["rope_scaling"] = {"type": "linear", "factor": inner.number("factor", 1.0, kind=float)}
    elif kind == "llama3":
        scaling = {n: inner.number(n, kind=float) for n in ("factor", "low_freq_factor", "high_freq_factor")}
        scaling["original_max_position_embeddings"] = inner.number("original_max_position_embeddings")
        found["rope_scaling"] = {"type": "llama3", **scaling}
    elif kind != "default":
        raise ConvertError(
            f"{c.where} has RoPE scaling of type {kind}",
            why="its frequencies would be others here",
            fix="Only default, linear and llama3 can be imported.",
        )
    return found


def _gpt2(c: _Keys) -> dict[str, Any]:
    act = c.only("activation_function", tuple(_GELU), "its MLP has another activation")
    c.only("scale_attn_weights", (True,), "its attention is not scaled by 1/sqrt(head width)")
    c.only("scale_attn_by_inverse_layer_idx", (False,), "its attention is scaled by the layer's number")
    c.only("add_cross_attention", (False,), "it has cross-attention")
    hidden = c.number("n_embd", 768)
    rates = {c.number(n, 0.1, kind=float) for n in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    return {
        "family": "gpt",
        "num_layers": c.number("n_layer", 12),
        "hidden_size": hidden,
        "num_attention_heads": c.number("n_head", 12),
        "ffn_hidden_size": c.number("n_inner", 4 * hidden),
        "vocab_size": c.number("vocab_size", 50257),
        "max_position_embeddings": c.number("n_positions", 1024),
        "tie_embeddings": bool(c.values.get("tie_word_embeddings", True)),
        "norm_eps": c.number("layer_norm_epsilon", 1e-5, kind=float),
        "init_std": c.number("initializer_range", 0.02, kind=float) or 0.02,
        "activation": _GELU[act],
        "dropout": rates.pop() if len(rates) == 1 else 0.0,  # one probability here: three different ones are left to the user
    }


def _nanogpt(c: _Keys) -> dict[str, Any]:
    """nanoGPT has no option for what is constant here: its GELU is exact, its norms add 1e-5, its output is the embedding."""
    hidden, bias = c.number("n_embd"), bool(c.values.get("bias", True))
    return {
        "family": "gpt",
        "num_layers": c.number("n_layer"),
        "hidden_size": hidden,
        "num_attention_heads": c.number("n_head"),
        "ffn_hidden_size": 4 * hidden,
        "vocab_size": c.number("vocab_size"),
        "max_position_embeddings": c.number("block_size"),
        "tie_embeddings": True,
        "norm_eps": 1e-5,
        "activation": "gelu",
        "attention_bias": bias,
        "mlp_bias": bias,
        "norm_bias": bias,
        "dropout": c.number("dropout", 0.0, kind=float),
    }


_READERS: dict[str, Callable[[_Keys], dict[str, Any]]] = {"llama": _llama, "gpt2": _gpt2, "nanogpt": _nanogpt}


def foreign_config(m: ModelSection, *, dtype: str) -> tuple[str, dict[str, Any]]:
    """The table to export a model by, and its config.json with names that transformers 4.45 and later read.

    Raises ConvertError naming every key that no model of transformers' has.
    """
    assert m.vocab_size is not None
    odd = {"model.qk_layernorm": m.qk_layernorm}
    if m.family == "gpt":
        odd["model.num_query_groups"] = m.num_query_groups != m.num_attention_heads
        odd["model.head_dim"] = m.head_dim != m.hidden_size // m.num_attention_heads
    if names := [k for k, v in odd.items() if v]:
        kind = "Llama" if m.family == "llama" else "GPT-2"
        said = ", ".join(f"{k}={str(getattr(m, k.split('.')[1])).lower()}" for k in names)
        raise ConvertError(f"the model has {said}", why=f"{kind} in transformers has no such thing", fix="Such a model cannot be exported.")
    if m.family == "gpt":
        return "gpt2", {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_layer": m.num_layers,
            "n_embd": m.hidden_size,
            "n_head": m.num_attention_heads,
            "n_inner": m.ffn_hidden_size,
            "n_positions": m.max_position_embeddings,
            "n_ctx": m.max_position_embeddings,
            "vocab_size": m.vocab_size,
            "tie_word_embeddings": m.tie_embeddings,
            "layer_norm_epsilon": m.norm_eps,
            "initializer_range": m.init_std,
            "activation_function": {v: k for k, v in reversed(_GELU.items())}[str(m.activation)],
            "resid_pdrop": m.dropout,
            "embd_pdrop": m.dropout,
            "attn_pdrop": m.dropout,
            "torch_dtype": dtype,
        }
    scaling: dict[str, Any] | None = None
    if m.rope_scaling is not None:
        scaling = {"rope_type": m.rope_scaling.type, "factor": m.rope_scaling.factor}
        if m.rope_scaling.type == "llama3":
            names = ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
            scaling |= {n: getattr(m.rope_scaling, n) for n in names}
    return "llama", {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": m.num_layers,
        "hidden_size": m.hidden_size,
        "num_attention_heads": m.num_attention_heads,
        "num_key_value_heads": m.num_query_groups,
        "head_dim": m.head_dim,
        "intermediate_size": m.ffn_hidden_size,
        "vocab_size": m.vocab_size,
        "max_position_embeddings": m.max_position_embeddings,
        "tie_word_embeddings": m.tie_embeddings,
        "rms_norm_eps": m.norm_eps,
        "initializer_range": m.init_std,
        "hidden_act": "silu",
        "attention_bias": m.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": m.mlp_bias,
        "rope_theta": m.rope_theta,
        "rope_scaling": scaling,
        "torch_dtype": dtype,
    }
