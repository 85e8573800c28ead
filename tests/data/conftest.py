"""Small texts, prepared once, and configs that read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit.config.schema import RunConfig
from toolkit.data.prepare import prepare

WORDS = ["alpha", "beta", "gamma", "delta", "épsilon", "ζeta", "漢字", "🙂", "\n", "  ", "def f(x):", "return", "0", "42"]


def make_texts(count: int, *, seed: int = 0) -> list[str]:
    """Documents of 20 to 200 words, of more than one script."""
    rng = np.random.default_rng(seed)
    return [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(20, 200))) for _ in range(count)]


def write_folder(folder: Path, texts: list[str]) -> Path:
    """One .txt file for each text."""
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("corpus") / "texts", make_texts(120))


@pytest.fixture(scope="session")
def prefix(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as bytes."""
    out = tmp_path_factory.mktemp("prepared") / "bytes"
    prepare(str(corpus), out=out)
    return out


@pytest.fixture
def config(tmp_path: Path, prefix: Path) -> Callable[..., RunConfig]:
    """A tiny run; sections given by name replace single keys."""

    def build(**sections: dict[str, Any]) -> RunConfig:
        raw: dict[str, dict[str, Any]] = {
            "run": {"dir": tmp_path / "runs" / "one"},
            "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4},
            "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "seq_length": 32},
            "data": {"source": str(prefix)},
        }
        for name, keys in sections.items():
            raw.setdefault(name, {}).update(keys)
        if raw["data"].get("blend"):
            raw["data"].pop("source")
        return RunConfig.model_validate(raw)

    return build
