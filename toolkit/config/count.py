"""How many parameters a model has: pure arithmetic on its config."""

from __future__ import annotations

from toolkit.config.schema import ModelSection
from toolkit.errors import ConfigError


def padded_vocab(vocab_size: int, multiple: int) -> int:
    """Rows of the embedding: vocab_size rounded up to a multiple, whatever the layout."""
    return -(-vocab_size // multiple) * multiple


def layer_parameter_count(model: ModelSection) -> int:
    """Parameters of one transformer layer: attention, MLP and its norms."""
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.head_dim
    groups = model.num_query_groups
    assert f is not None and d is not None and groups is not None, "the schema fills these"
    query, key_value = model.num_attention_heads * d, 2 * groups * d
    attention = h * (query + key_value) + query * h
    norm = 2 * h if model.norm_bias else h  # RMSNorm has a scale, LayerNorm a scale and a bias
    mlp = (3 if model.family == "llama" else 2) * h * f
    biases = query + key_value + h if model.attention_bias else 0
    if model.mlp_bias:
        biases += (2 if model.family == "llama" else 1) * f + h
    qk_norm = (4 if model.norm_bias else 2) * d if model.qk_layernorm else 0
    return attention + mlp + biases + 2 * norm + qk_norm


def largest_weights(model: ModelSection) -> tuple[int, int]:
    """Elements of the largest matrix that tensor-parallel ranks share out, and of the largest that each holds whole (learned positions).

    model.vocab_size: null counts as the multiple it is padded to.
    """
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.head_dim
    assert f is not None and d is not None and model.num_query_groups is not None, "the schema fills these"
    rows = (
        padded_vocab(model.vocab_size or model.vocab_multiple, model.vocab_multiple),
        (2 if model.family == "llama" else 1) * f,
        (model.num_attention_heads + 2 * model.num_query_groups) * d,
    )
    return h * max(rows), h * model.max_position_embeddings if model.family == "gpt" else 0


def parameter_count(model: ModelSection, *, padded: bool = False) -> int:
    """Parameters of the whole model, tied copies once; padded: with the embedding rows that pad the vocabulary.

    Raises ConfigError when model.vocab_size is null, since only the tokenizer knows it then.
    """
    if model.vocab_size is None:
        raise ConfigError("model.vocab_size=null leaves the parameter count open", fix="Set model.vocab_size to the tokenizer's size.")
    h = model.hidden_size
    vocab = padded_vocab(model.vocab_size, model.vocab_multiple) if padded else model.vocab_size
    embeddings = vocab * h * (1 if model.tie_embeddings else 2)
    positions = model.max_position_embeddings * h if model.family == "gpt" else 0
    final_norm = 2 * h if model.norm_bias else h
    return embeddings + positions + model.num_layers * layer_parameter_count(model) + final_norm
