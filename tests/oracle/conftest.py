"""Models to start from, and a run of the training program on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import loop
from tests.convert import models
from tests.pool import Pool
from toolkit.convert.exporting import export_model
from toolkit.convert.importing import import_model

# two ranks can share its heads, and two stages or four chunks its layers
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 257,
    "max_position_embeddings": 40,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
}
MAKE: dict[str, Callable[[], Any]] = {
    "llama": lambda: models.llama(**SHAPE),
    "llama-tied": lambda: models.llama(**SHAPE | {"tie_word_embeddings": True}),
    "gpt2": lambda: models.gpt2(n_embd=32, n_head=4, vocab_size=257, n_positions=40),
    "qwen3": lambda: models.like_llama("qwen3", **SHAPE | {"head_dim": 12}),
    "mistral": lambda: models.like_llama("mistral", **SHAPE),
    "qwen2": lambda: models.like_llama("qwen2", **SHAPE),
}


class Folders:
    """Each model as transformers saves it and as toolkit imports it, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name: str) -> tuple[Path, Path]:
        """(Hugging Face folder, imported folder)."""
        theirs, ours = self.root / name / "hf", self.root / name / "ours"
        if not ours.exists():
            models.saved(MAKE[name](), theirs)
            import_model(theirs, ours)
        return theirs, ours


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def configured(folders: Folders, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """configured(model, keys): the YAML that the import wrote with `section.key` values set, for a
    run in a folder of its own.
    """
    numbers = itertools.count()

    def make(name: str, keys: dict[str, Any]) -> dict[str, Any]:
        folder = folders(name)[1]
        imported = yaml.safe_load((folder / "config.yaml").read_text())
        imported["checkpoint"]["init_from"] = str(folder)  # the file names its own folder as "."
        run = tmp_path_factory.mktemp("oracle") / f"run-{next(numbers)}"
        return loop.config_of(text, run, keys, base=imported)

    return make


@pytest.fixture(scope="session")
def trained(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[dict[str, Any]], Any]]:
    """trained(world, raw): metrics of a run of the training program, and transformers' model of
    what it exports at the end.
    """

    def run(world: int, raw: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
        from tests.oracle.reference import load

        raw["checkpoint"]["every"] = raw["train"]["steps"]
        pool.run("tests.loop:train", world, raw, deadline_s=180)
        folder = Path(raw["run"]["dir"])
        out = tmp_path_factory.mktemp("export") / "hf"
        export_model(folder, out)
        return loop.metrics(folder), load(out)

    return run
