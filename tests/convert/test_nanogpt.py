"""nanoGPT's ckpt.pt: the imported model computes what the forward pass written down here computes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.convert.models import tokens
from tests.convert.run import config_of
from tests.pool import Pool
from toolkit.convert.exporting import export_model
from toolkit.convert.importing import import_model
from toolkit.errors import ConvertError


def checkpoint(folder: Path, *, bias: bool, vocab: int = 65) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """A ckpt.pt as nanoGPT's train.py saves one from a compiled model."""
    args = {"n_layer": 2, "n_head": 2, "n_embd": 24, "block_size": 32, "bias": bias, "vocab_size": vocab, "dropout": 0.0}
    generator = torch.Generator().manual_seed(3)
    h = args["n_embd"]
    shapes = {"transformer.wte.weight": (vocab, h), "transformer.wpe.weight": (32, h), "transformer.ln_f.weight": (h,)}
    for i in range(args["n_layer"]):
        layer = {
            "ln_1": (h,),
            "attn.c_attn": (3 * h, h),
            "attn.c_proj": (h, h),
            "ln_2": (h,),
            "mlp.c_fc": (4 * h, h),
            "mlp.c_proj": (h, 4 * h),
        }
        shapes |= {f"transformer.h.{i}.{name}.weight": shape for name, shape in layer.items()}
    if bias:
        norms_and_linears = [n for n in shapes if "wte" not in n and "wpe" not in n]
        shapes |= {n.replace(".weight", ".bias"): (shapes[n][0],) for n in norms_and_linears}
    state = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    saved = {
        "model": {f"_orig_mod.{k}": v for k, v in state.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "model_args": args,
        "iter_num": 7,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "shakespeare_char", "compile": True},
    }
    path = folder / "ckpt.pt"
    torch.save(saved, path)
    return path, state, args


def forward(state: dict[str, Tensor], args: dict[str, Any], ids: Tensor) -> Tensor:
    """Logits [b, s, vocab] of a GPT with pre-norm, exact GELU and tied embeddings."""
    heads, h = args["n_head"], args["n_embd"]
    b, s = ids.shape

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (h,), state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)

    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][:s]
    causal = torch.full((s, s), -torch.inf).triu(1)
    for i in range(args["n_layer"]):
        at = f"transformer.h.{i}."
        q, k, v = (t.view(b, s, heads, -1).transpose(1, 2) for t in linear(norm(x, at + "ln_1"), at + "attn.c_attn").chunk(3, dim=-1))
        weights = torch.softmax(q @ k.transpose(-1, -2) / (h // heads) ** 0.5 + causal, dim=-1)
        x = x + linear((weights @ v).transpose(1, 2).reshape(b, s, h), at + "attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, at + "ln_2"), at + "mlp.c_fc")), at + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["transformer.wte.weight"].t()


@pytest.mark.parametrize("bias", [True, False])
def test_logits(bias: bool, pool: Pool, tmp_path: Path) -> None:
    path, state, args = checkpoint(tmp_path, bias=bias)
    import_model(path, tmp_path / "ours")
    expected = forward(state, args, tokens(65)).numpy()
    keys = {"parallel.tp": 2, "zero.stage": 3, "train.precision": "fp32"}
    (ours, _) = pool.run("tests.convert.run:logits", 2, config_of(tmp_path / "ours", keys, run=tmp_path / "run"), deadline_s=120)
    assert abs(ours[..., :65] - expected).max() <= 1e-5 * abs(expected).max()


def test_on_to_transformers(tmp_path: Path) -> None:
    """Without biases it becomes a GPT-2 whose biases are 0."""
    from transformers import AutoModelForCausalLM

    _, state, args = checkpoint(tmp_path, bias=False)
    import_model(tmp_path, tmp_path / "ours")  # the folder that train.py wrote
    export_model(tmp_path / "ours", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    expected = forward(state, args, tokens(65))
    with torch.no_grad():
        assert torch.allclose(model(tokens(65)).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


class _RunsCode:
    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)

    def __init__(self, folder: str) -> None:
        self.folder = folder


def test_code_in_it_is_not_run(tmp_path: Path) -> None:
    path, _, args = checkpoint(tmp_path, bias=True)
    torch.save({"model": _RunsCode(str(tmp_path / "ran")), "model_args": args}, path)
    with pytest.raises(ConvertError, match=r"ckpt\.pt cannot be loaded safely"):
        import_model(path, tmp_path / "ours")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "ours").exists()


def test_not_nanogpts(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "ckpt.pt")
    with pytest.raises(ConvertError, match="it has state_dict, epoch"):
        import_model(tmp_path / "ckpt.pt", tmp_path / "ours")


def test_tokenizer_is_asked_for(tmp_path: Path) -> None:
    path, _, _ = checkpoint(tmp_path, bias=True)
    done = import_model(path, tmp_path / "ours")
    assert done.tokenizer is None and "set data.tokenizer" in (tmp_path / "ours" / "config.yaml").read_text()
    gpt2, _, _ = checkpoint(tmp_path, bias=True, vocab=50304)
    assert import_model(gpt2, tmp_path / "gpt2").tokenizer == "openai-community/gpt2"
