"""What a saving is to keep: bytes as promised, logits near the plain model's, zeros where a mask says so."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.convert import models  # noqa: E402
from toolkit.errors import ConfigError  # noqa: E402

LOGITS = "tests.inference.run:logits"
TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose widths int4's groups divide, on two ranks too."""
    shape = models.draw(2, even=True) | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 64}
    shape |= {"intermediate_size": 128, "vocab_size": 257, "max_position_embeddings": 64, "tie_word_embeddings": True}
    return models.saved(models.llama(**shape), tmp_path_factory.mktemp("savings") / "hf", dtype=torch.bfloat16)


def ask(pool: Pool, folder: Path, world: int = 1, **more: Any) -> dict[str, Any]:
    overrides = [f"parallel.tp={world}"]
    found: dict[str, Any] = pool.run(LOGITS, world, {"model": str(folder), "overrides": overrides, **more}, deadline_s=120)[0]
    weights, cache = found["expected"]
    assert found["weight_bytes"] == weights  # to the byte what `toolkit estimate --inference` says
    assert found["cache_bytes"] == cache or "grow" in more
    return found


def far(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Root of the mean square difference over that of the plain logits."""
    difference = torch.from_numpy(a["logits"] - b["logits"])
    return float(difference.pow(2).mean().sqrt() / torch.from_numpy(b["logits"]).pow(2).mean().sqrt())


@TORCHAO
@pytest.mark.parametrize(("weights", "most", "error"), [("int8", 0.55, 0.05), ("int4", 0.40, 0.4)])
def test_fewer_bits_a_weight(weights: str, most: float, error: float, pool: Pool, folder: Path) -> None:
    plain = ask(pool, folder)
    small = ask(pool, folder, weights=weights)
    assert small["weight_bytes"] <= most * plain["weight_bytes"]
    assert 0 < far(small, plain) <= error
    assert far(ask(pool, folder, world=2, weights=weights), plain) <= error


def test_keys_and_values_in_8_bits(pool: Pool, folder: Path) -> None:
    plain, small = ask(pool, folder), ask(pool, folder, kv="int8")
    assert small["cache_bytes"] == plain["cache_bytes"] * (32 + 2) / 64  # of a head's 32 numbers in bf16, and one scale
    assert 0 < far(small, plain) <= 0.05


def test_a_growing_cache_takes_less_and_says_the_same(pool: Pool, folder: Path) -> None:
    plain, grown = ask(pool, folder), ask(pool, folder, grow=True)
    assert grown["cache_bytes"] < plain["cache_bytes"] and far(grown, plain) == 0.0


@pytest.mark.parametrize("prune", ["0.25", "2:4"])
def test_pruned_weights_are_zero(prune: str, pool: Pool, folder: Path) -> None:
    assert ask(pool, folder, prune=prune)["zeros"] == pytest.approx(0.5 if prune == "2:4" else 0.25, abs=0.01)


def test_masks_keep_the_largest() -> None:
    from toolkit.model.savings import check_mask, largest, share_of, two_of_four

    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.5, 0.0, -0.1, 0.2]])
    assert two_of_four(weight).tolist() == [[False, True, True, False, True, False, False, True]]
    assert largest(weight, keep=0.25).tolist() == [[False, True, True] + [False] * 5]
    with pytest.raises(RuntimeError):
        check_mask(weight, two_of_four(weight))
    for wrong in ("0", "1", "3:4", "half"):
        with pytest.raises(ConfigError):
            share_of(wrong)
