"""Files that go with a model's weights wherever they go: tokenizer and generation settings. No torch."""

from __future__ import annotations

from pathlib import Path

CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def carried_files(path: Path) -> dict[str, bytes]:
    """Tokenizer and generation settings in a folder, by name."""
    return {name: (path / name).read_bytes() for name in CARRIED if (path / name).is_file()}
