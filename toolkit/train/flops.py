"""Model FLOPs per token and peak FLOP/s of a device: what MFU divides."""

from __future__ import annotations

from toolkit.config.count import padded_vocab
from toolkit.config.schema import ModelSection

# dense bf16/fp16 tensor-core FLOP/s from the makers' datasheets; the first name found in the device's wins
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A800": 312e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "V100": 125e12,
    "MI300X": 1307e12,
}


def flops_per_token(model: ModelSection, *, seq_length: int) -> float:
    """FLOPs of forward and backward per token, without recompute, every matrix multiply at 2mnk.

    Attention scores count all s × s pairs (PaLM, arXiv 2204.02311, appendix B), so that figures
    compare with what others publish; the backward costs twice the forward.
    """
    assert model.vocab_size is not None and model.ffn_hidden_size and model.head_dim and model.num_query_groups
    h, heads = model.hidden_size, model.num_attention_heads * model.head_dim
    attention = 2 * h * (heads + 2 * model.num_query_groups * model.head_dim) + 2 * heads * h + 4 * seq_length * heads
    mlp = 2 * h * model.ffn_hidden_size * (3 if model.family == "llama" else 2)
    logits = 2 * h * padded_vocab(model.vocab_size, model.vocab_multiple)
    return 3.0 * (model.num_layers * (attention + mlp) + logits)


def peak_flops(device_name: str) -> float | None:
    """Dense 16-bit FLOP/s of a GPU by its name; None where it is not known (a CPU)."""
    for name, peak in PEAK_FLOPS.items():
        if name.lower() in device_name.lower():
            return peak
    return None
