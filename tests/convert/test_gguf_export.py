"""A model written as GGUF comes back bit for bit, is to transformers what it was, and says so where
it cannot be written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from tests.convert import models  # noqa: E402
from toolkit.checkpoint.whole import WholeCheckpoint  # noqa: E402
from toolkit.convert.gguf_export import export_gguf, pre_tokenizer_name  # noqa: E402
from toolkit.convert.importing import import_model  # noqa: E402
from toolkit.errors import ConvertError  # noqa: E402

PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "mlp_bias": False, "attention_bias": False}


def made(family: str, folder: Path, **more: Any) -> Path:
    """A random model of a family, imported."""
    if family == "gpt":
        model = models.gpt2(n_head=3)
    else:
        shape = models.draw(11, even=True) | PLAIN | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 40}
        if family == "qwen3":
            shape["head_dim"] = 128  # transformers takes no other from a GGUF file
        model = models.llama(**shape | more) if family == "llama" else models.like_llama(family, **shape | more)
    import_model(models.saved(model, folder / "hf"), folder / "ours")
    return folder / "ours"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_come_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    ours = made(family, tmp_path)
    done = export_gguf(ours, tmp_path / "model.gguf")
    assert done.dtype == "fp32" and (tmp_path / "model.gguf").stat().st_size > done.bytes
    import_model(tmp_path / "model.gguf", tmp_path / "back")
    with WholeCheckpoint(ours) as before, WholeCheckpoint(tmp_path / "back") as after:
        assert before.names == after.names
        for name in before.names:
            assert torch.equal(before.read(name), after.read(name)), name
        keys = ("family", "num_query_groups", "head_dim", "rope_theta", "norm_eps", "max_position_embeddings", "vocab_size", "num_layers")
        a, b = (w.manifest.config["model"] for w in (before, after))
        assert {k: a[k] for k in keys} == {k: pytest.approx(b[k]) if isinstance(b[k], float) else b[k] for k in keys}


def test_gpt2_is_stored_as_llama_cpp_has_it(tmp_path: Path) -> None:
    """Linear weights the other way round than transformers' Conv1D; its reader takes no GPT-2 of
    another size than the published one.
    """
    import gguf
    from safetensors.torch import load_file

    export_gguf(made("gpt", tmp_path), tmp_path / "model.gguf")
    there = {k: v for f in (tmp_path / "hf").glob("*.safetensors") for k, v in load_file(f).items()}
    here = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, theirs, turned in (
        ("token_embd.weight", "wte.weight", False),
        ("position_embd.weight", "wpe.weight", False),
        ("blk.1.attn_qkv.weight", "h.1.attn.c_attn.weight", True),
        ("blk.1.attn_qkv.bias", "h.1.attn.c_attn.bias", False),
        ("blk.0.ffn_down.weight", "h.0.mlp.c_proj.weight", True),
        ("output_norm.bias", "ln_f.bias", False),
    ):
        expected = there[f"transformer.{theirs}"]
        assert torch.equal(here[name], expected.t() if turned else expected), name


def test_transformers_computes_the_same_from_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = made("llama", tmp_path)
    export_gguf(ours, tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        found = theirs(models.tokens(theirs.config.vocab_size)).logits
    assert torch.allclose(found, models.logits(tmp_path / "hf"), atol=1e-5)


def test_bf16_keeps_matrices_and_widens_norms(tmp_path: Path) -> None:
    import gguf

    export_gguf(made("llama", tmp_path), tmp_path / "model.gguf", dtype="bf16")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "BF16" and kinds["blk.0.attn_norm.weight"] == "F32" and kinds["token_embd.weight"] == "BF16"


def test_what_a_file_cannot_say_is_refused(tmp_path: Path) -> None:
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}
    with pytest.raises(ConvertError, match="rope_scaling=linear"):
        export_gguf(made("llama", tmp_path / "a", **scaled), tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".partial*"))
    (tmp_path / "there.gguf").touch()
    with pytest.raises(ConvertError, match="exists"):
        export_gguf(tmp_path / "a" / "ours", tmp_path / "there.gguf")


def test_ways_to_split_text_are_known_by_name() -> None:
    byte_level = {"type": "ByteLevel", "use_regex": True}
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]}
    llama3 = {"type": "Split", "pattern": {"Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|x|\p{N}{1,3}| y"}}
    named = {"gpt-2": byte_level, "smollm": digits, "llama-bpe": {"pretokenizers": [llama3, {"type": "ByteLevel"}]}}
    for name, steps in named.items():
        assert pre_tokenizer_name({"model": {"type": "BPE"}, "pre_tokenizer": steps}) == name
    assert pre_tokenizer_name({"model": {"type": "Unigram"}, "pre_tokenizer": byte_level}) is None
    assert pre_tokenizer_name(json.loads('{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Whitespace"}}')) is None
