"""Imported models compute what transformers computes, in every layout, and come back with the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pool import Pool

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoConfig  # noqa: E402

from tests.convert import models  # noqa: E402
from tests.convert.run import config_of  # noqa: E402
from toolkit.config.load import load_config, parse_config  # noqa: E402
from toolkit.convert.exporting import export_model  # noqa: E402
from toolkit.convert.importing import import_model  # noqa: E402
from toolkit.parallel.rules import Machine, check  # noqa: E402

LOGITS, STEP = "tests.convert.run:logits", "tests.convert.run:one_step"
LAYOUTS: list[dict[str, Any]] = [
    {"parallel.tp": 2, "zero.stage": 1},
    {"parallel.pp": 2, "zero.stage": 3},
    {"parallel.tp": 2, "parallel.sequence_parallel": True, "zero.stage": 3},
    {"parallel.pp": 2, "zero.stage": 2},
]
GPT2: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 50, "n_head": 6},
]


def difference(ours: np.ndarray, theirs: Any) -> float:
    """Largest difference over the largest logit; ids beyond the vocabulary must have none."""
    vocab = theirs.shape[-1]
    assert np.all(ours[..., vocab:] == -np.inf)
    reference = theirs.numpy()
    return float(np.abs(ours[..., :vocab] - reference).max() / np.abs(reference).max())


def check_logits(pool: Pool, out: Path, expected: Any, layouts: list[dict[str, Any]], run: Path) -> None:
    for keys in layouts:
        world = keys.get("parallel.tp", 1) * keys.get("parallel.pp", 1) * keys.get("dp", 1)
        keys = {k: v for k, v in keys.items() if k != "dp"} | {"train.precision": "fp32"}
        found = pool.run(LOGITS, world, config_of(out, keys, run=run), deadline_s=120)
        for ours in (f for f in found if f is not None):
            assert difference(ours, expected) <= 1e-5, keys


def same(a: Path, b: Path) -> None:
    """transformers loads the same model from both folders, in the same dtype, bit for bit."""
    from transformers import AutoModelForCausalLM

    one, two = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (a, b))
    assert type(one) is type(two) and one.dtype == two.dtype
    there, back = one.state_dict(), two.state_dict()
    assert there.keys() == back.keys()
    assert all(torch.equal(there[k], back[k]) for k in there)
    assert one.num_parameters() == two.num_parameters()


@pytest.mark.parametrize("seed", range(6))
def test_llama(seed: int, pool: Pool, tmp_path: Path) -> None:
    layout = LAYOUTS[seed % 4]
    shape = models.draw(seed, even="parallel.tp" in layout)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    model = models.llama(**shape)
    hf = models.saved(model, tmp_path / "hf", dtype=dtype)
    done = import_model(hf, tmp_path / "ours")
    assert (
        done.parameters
        == model.num_parameters()
        == parse_config(config_of(tmp_path / "ours", {}, run=tmp_path)).model.spec.unpadded_parameters
    )
    export_model(tmp_path / "ours", tmp_path / "back", shard_gb=40e-6)
    same(hf, tmp_path / "back")
    check_logits(pool, tmp_path / "ours", models.logits(hf), [{}, layout] if seed < 2 else [layout], tmp_path / "run")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_families_like_llama(family: str, seed: int, pool: Pool, tmp_path: Path) -> None:
    layout = {"parallel.tp": 2, "parallel.pp": 2, "zero.stage": 3} if seed else {"parallel.pp": 2, "zero.stage": 2}
    model = models.like_llama(family, **models.draw(seed + 10, even=bool(seed)))
    hf = models.saved(model, tmp_path / "hf", dtype=(torch.float32, torch.bfloat16)[seed])
    done = import_model(hf, tmp_path / "ours")
    assert done.parameters == model.num_parameters()
    assert config_of(tmp_path / "ours", {}, run=tmp_path)["model"]["family"] == family
    export_model(tmp_path / "ours", tmp_path / "back", shard_gb=40e-6)
    same(hf, tmp_path / "back")
    old, new = (AutoConfig.from_pretrained(f).to_diff_dict() for f in (hf, tmp_path / "back"))
    assert {k: v for k, v in new.items() if k in old} == old | {"dtype": new["dtype"]}, "config.json says something else"
    check_logits(pool, tmp_path / "ours", models.logits(hf), [{}, layout], tmp_path / "run")


@pytest.mark.parametrize(
    ("shape", "layout"), zip(GPT2, ({"parallel.pp": 2, "zero.stage": 3}, {"parallel.tp": 2, "zero.stage": 2}), strict=True)
)
def test_gpt2(shape: dict[str, Any], layout: dict[str, Any], pool: Pool, tmp_path: Path) -> None:
    model = models.gpt2(**shape)
    hf = models.saved(model, tmp_path / "hf")
    import_model(hf, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back")
    same(hf, tmp_path / "back")
    check_logits(pool, tmp_path / "ours", models.logits(hf), [{}, layout], tmp_path / "run")


def test_gpt2_saved_from_its_inner_part(tmp_path: Path) -> None:
    """As the first published GPT-2s: names without transformer., and buffers beside the weights."""
    from safetensors.torch import load_file, save_file

    model = models.gpt2()
    hf = models.saved(model, tmp_path / "hf", shard="1GB")
    found = {k.removeprefix("transformer."): v for k, v in load_file(hf / "model.safetensors").items()}
    found["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(found, hf / "model.safetensors")
    import_model(hf, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back")
    export = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(export[k], v) for k, v in model.state_dict().items() if k in export) and "transformer.wte.weight" in export


def test_pickled_weights(tmp_path: Path) -> None:
    """pytorch_model.bin, mapped and never unpickled beyond tensors; with the tied copy that it holds."""
    model = models.llama(**(models.draw(2, even=True) | {"tie_word_embeddings": True}))
    hf = models.saved(model, tmp_path / "hf")
    for path in hf.glob("model*.safetensors*"):
        path.unlink()
    torch.save(model.state_dict(), hf / "pytorch_model.bin")
    import_model(hf, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back")
    same(hf, tmp_path / "back")


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}, ["parallel.tp=2"]),
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 2}, ["parallel.pp=2"]),
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 1}, []),
    ],
)
def test_the_command_above_the_config_is_legal(shape: dict[str, int], cut: list[str], tmp_path: Path) -> None:
    """It trains on two processes, cut as far as heads and layers divide, and saves what an export needs."""
    plain = {"head_dim": 4, "hidden_size": 36, "intermediate_size": 34, "vocab_size": 131, "max_position_embeddings": 32}
    done = import_model(models.saved(models.llama(**plain, **shape), tmp_path / "hf"), tmp_path / "ours")
    command = next(line for line in done.config.read_text().splitlines() if "toolkit train" in line).split()
    assert command[-2:] == ["--num-procs", "2"] and command[5:-2] == cut, command
    config = load_config(done.config, ["data.source=text", "data.tokenizer=bytes", *cut])
    check(config, 2, machine=Machine(cuda=True))
    assert 0 < config.checkpoint.every <= config.train.steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trained_in_another_layout(precision: str, pool: Pool, tmp_path: Path) -> None:
    """HF -> import -> a step of TP 2 x PP 2 x ZeRO-3 with a learning rate of 0 -> save -> export:
    the same bits.
    """
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    shape = models.draw(4, even=True) | {"tie_word_embeddings": precision == "bf16"}
    hf = models.saved(models.llama(**shape), tmp_path / "hf", dtype=dtype)
    tokenizer = b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
    (hf / "tokenizer.json").write_bytes(tokenizer)
    import_model(hf, tmp_path / "ours")
    keys = {"parallel.tp": 2, "parallel.pp": 2, "zero.stage": 3, "train.precision": precision, "checkpoint.every": 1}
    pool.run(STEP, 4, config_of(tmp_path / "ours", keys, run=tmp_path / "run"), deadline_s=120)
    export_model(tmp_path / "run", tmp_path / "back")
    same(hf, tmp_path / "back")
    # what training knows nothing of comes from where the run started
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == tokenizer
    old, new = (json.loads((f / "config.json").read_bytes()) for f in (hf, tmp_path / "back"))
    assert new["eos_token_id"] == old["eos_token_id"] and (tmp_path / "back" / "generation_config.json").exists()


def test_dtype_is_a_choice(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf = models.saved(models.llama(**models.draw(3, even=False)), tmp_path / "hf")
    import_model(hf, tmp_path / "ours", dtype="bf16")
    export_model(tmp_path / "ours", tmp_path / "back", dtype="fp32")
    one, two = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (hf, tmp_path / "back"))
    assert two.dtype == torch.float32
    assert all(torch.equal(a.bfloat16().float(), b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
