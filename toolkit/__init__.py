"""Train GPT and Llama on megatron-core layers with DeepSpeed ZeRO, in any layout, with the same result."""

__version__ = "0.1.0"
