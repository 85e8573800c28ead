"""Which tensors of other formats make up ours: one table for both directions, data only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from toolkit.config.count import padded_vocab
from toolkit.config.schema import ModelSection

Join = Literal["same", "rows", "stack", "qkv"]
"""How their tensors make ours: as it is; with rows that pad the vocabulary; one above the other; per query group [q heads, k, v]."""


@dataclass(frozen=True)
class Part:
    """A tensor of theirs. name: {i} is the layer; shape: sizes by name, as in a torch.nn.Linear; turned: stored transposed, as GPT-2's Conv1D."""

    name: str
    shape: tuple[str, ...]
    turned: bool = False


@dataclass(frozen=True)
class Entry:
    """A tensor of ours and theirs that make it. needs: the model key without which there is none."""

    ours: str
    parts: tuple[Part, ...]
    join: Join = "same"
    needs: str = ""


def _linear(ours: str, names: tuple[str, ...], rows: tuple[str, ...], columns: str, *, join: Join = "same", needs: str) -> list[Entry]:
    """Weight and bias of one of our linear layers."""
    weights = tuple(Part(f"{n}.weight", (r, columns)) for n, r in zip(names, rows, strict=True))
    biases = tuple(Part(f"{n}.bias", (r,)) for n, r in zip(names, rows, strict=True))
    return [Entry(f"{ours}.weight", weights, join), Entry(f"{ours}.bias", biases, join, needs)]


def _norm(ours: str, theirs: str, *, bias: bool) -> list[Entry]:
    weight = Entry(f"{ours}.weight", (Part(f"{theirs}.weight", ("hidden",)),))
    return [weight, Entry(f"{ours}.bias", (Part(f"{theirs}.bias", ("hidden",)),), needs="norm_bias")] if bias else [weight]


_L, _H, _N = "decoder.layers.{i}.", "model.layers.{i}.", "transformer.h.{i}."

LLAMA: tuple[Entry, ...] = (
    Entry("embedding.word_embeddings.weight", (Part("model.embed_tokens.weight", ("vocab", "hidden")),), "rows"),
    *_norm(_L + "input_layernorm", _H + "input_layernorm", bias=False),
    *_linear(
        _L + "self_attention.linear_qkv",
        tuple(f"{_H}self_attn.{n}_proj" for n in "qkv"),
        ("query", "key", "key"),
        "hidden",
        join="qkv",
        needs="attention_bias",
    ),
    *_linear(_L + "self_attention.linear_proj", (_H + "self_attn.o_proj",), ("hidden",), "query", needs="attention_bias"),
    *_norm(_L + "pre_mlp_layernorm", _H + "post_attention_layernorm", bias=False),
    *_linear(_L + "mlp.linear_fc1", (_H + "mlp.gate_proj", _H + "mlp.up_proj"), ("ffn", "ffn"), "hidden", join="stack", needs="mlp_bias"),
    *_linear(_L + "mlp.linear_fc2", (_H + "mlp.down_proj",), ("hidden",), "ffn", needs="mlp_bias"),
    *_norm("decoder.final_layernorm", "model.norm", bias=False),
    Entry("output_layer.weight", (Part("lm_head.weight", ("vocab", "hidden")),), "rows", needs="untied"),
)

NANOGPT: tuple[Entry, ...] = (
    Entry("embedding.word_embeddings.weight", (Part("transformer.wte.weight", ("vocab", "hidden")),), "rows"),
    Entry("embedding.position_embeddings.weight", (Part("transformer.wpe.weight", ("positions", "hidden")),)),
    *_norm(_L + "input_layernorm", _N + "ln_1", bias=True),
    *_linear(_L + "self_attention.linear_qkv", (_N + "attn.c_attn",), ("query_key_value",), "hidden", join="qkv", needs="attention_bias"),
    *_linear(_L + "self_attention.linear_proj", (_N + "attn.c_proj",), ("hidden",), "query", needs="attention_bias"),
    *_norm(_L + "pre_mlp_layernorm", _N + "ln_2", bias=True),
    *_linear(_L + "mlp.linear_fc1", (_N + "mlp.c_fc",), ("ffn",), "hidden", needs="mlp_bias"),
    *_linear(_L + "mlp.linear_fc2", (_N + "mlp.c_proj",), ("hidden",), "ffn", needs="mlp_bias"),
    *_norm("decoder.final_layernorm", "transformer.ln_f", bias=True),
    Entry("output_layer.weight", (Part("lm_head.weight", ("vocab", "hidden")),), "rows", needs="untied"),
)


def _turned(entry: Entry) -> Entry:
    matrix = ".linear_" in entry.ours and entry.ours.endswith(".weight")
    return replace(entry, parts=tuple(replace(p, turned=matrix) for p in entry.parts))


GPT2: tuple[Entry, ...] = tuple(map(_turned, NANOGPT))

TABLES = {"llama": LLAMA, "gpt2": GPT2, "nanogpt": NANOGPT}

IGNORED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of names of buffers that old files hold beside weights: constants that the model computes itself."""


def present(entry: Entry, model: ModelSection) -> bool:
    """Whether a model has this tensor."""
    if entry.needs == "untied":
        return not model.tie_embeddings
    return not entry.needs or bool(getattr(model, entry.needs))


def entries(table: tuple[Entry, ...], model: ModelSection, *, absent: bool = False) -> Iterator[Entry]:
    """The table written out for a model's layers, in model order. absent: also with the biases that it does not have."""
    layered = [e for e in table if "{i}" in e.ours]
    first = table.index(layered[0])
    flat = [*table[:first]]
    for i in range(model.num_layers):
        flat += [_numbered(e, i) for e in layered]
    flat += table[first + len(layered) :]
    yield from (e for e in flat if present(e, model) or (absent and e.needs != "untied"))


def _numbered(entry: Entry, i: int) -> Entry:
    parts = tuple(replace(p, name=p.name.replace("{i}", str(i))) for p in entry.parts)
    return replace(entry, ours=entry.ours.replace("{i}", str(i)), parts=parts)


def part_shape(part: Part, model: ModelSection) -> list[int]:
    """A tensor of theirs as it is stored."""
    shape = [_sizes(model)[name] for name in part.shape]
    return shape[::-1] if part.turned else shape


def our_shape(entry: Entry, model: ModelSection) -> list[int]:
    """A tensor of ours, whole, with the rows that pad the vocabulary."""
    sizes = _sizes(model)
    rows = sum(sizes[p.shape[0]] for p in entry.parts)
    if entry.join == "rows":
        rows = padded_vocab(rows, model.vocab_multiple)
    return [rows, *(sizes[name] for name in entry.parts[0].shape[1:])]


def _sizes(m: ModelSection) -> dict[str, int]:
    assert m.vocab_size and m.head_dim and m.num_query_groups and m.ffn_hidden_size, "the schema fills these"
    query, key = m.num_attention_heads * m.head_dim, m.num_query_groups * m.head_dim
    return {
        "vocab": m.vocab_size,
        "hidden": m.hidden_size,
        "query": query,
        "key": key,
        "query_key_value": query + 2 * key,
        "ffn": m.ffn_hidden_size,
        "positions": m.max_position_embeddings,
    }
