"""A random model with a tokenizer of its own, imported; for programs that read text, not ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.convert import models

END = "<|endoftext|>"
TEXT = "The quick brown fox jumps over the lazy dog. Packs of lazy foxes sleep, and the dog jumps."
CONTEXT = 64
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "mlp_bias": False, "attention_bias": False}


def made(family: str, folder: Path) -> Path:
    """A model of a family with a byte-level BPE tokenizer, in folder/ours; its context has CONTEXT places."""
    from tokenizers import ByteLevelBPETokenizer

    from toolkit.convert.importing import import_model

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=300, min_frequency=2, special_tokens=[END])
    vocab = tokenizer.get_vocab_size()
    if family == "gpt":
        model = models.gpt2(n_embd=32, n_head=4, n_positions=CONTEXT, vocab_size=vocab)
    else:
        shape = models.draw(11, even=True) | PLAIN | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32}
        shape |= {"intermediate_size": 64, "max_position_embeddings": CONTEXT, "vocab_size": vocab}
        model = models.llama(**shape) if family == "llama" else models.like_llama(family, **shape)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.token_to_id(END)
    hf = models.saved(model, folder / "hf")
    tokenizer.save(str(hf / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "model_max_length": CONTEXT}
    (hf / "tokenizer_config.json").write_text(json.dumps(settings))
    import_model(hf, folder / "ours")
    return folder / "ours"
