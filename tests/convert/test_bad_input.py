"""What cannot be converted is refused with a name, a reason and a way out, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert import models
from toolkit.convert.exporting import export_model
from toolkit.convert.importing import import_model
from toolkit.errors import CheckpointError, ConvertError

SHAPE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 131,
    "max_position_embeddings": 32,
}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return models.saved(models.llama(**SHAPE), tmp_path / "hf", shard="1GB")


def change(key: str, value: Any) -> Callable[[Path], None]:
    def act(hf: Path) -> None:
        config = json.loads((hf / "config.json").read_bytes())
        (hf / "config.json").write_text(json.dumps(config | {key: value}))

    return act


def weights(act: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(hf: Path) -> None:
        found = load_file(hf / "model.safetensors")
        act(found)
        save_file(found, hf / "model.safetensors")

    return rewrite


def truncate(hf: Path) -> None:
    path = hf / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def big_tokenizer(hf: Path) -> None:
    vocab = {f"t{i}": i for i in range(140)}
    (hf / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": []}))


NAME = "model.layers.1.mlp.up_proj.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "architecture": (
        change("architectures", ["LlamaForSequenceClassification"]),
        r"LlamaForSequenceClassification.*nearest one that is supported is LlamaForCausalLM",
    ),
    "unlike-any": (change("architectures", ["MambaForCausalLM"]), r"MambaForCausalLM.*Supported are GPT2LMHeadModel, LlamaForCausalLM"),
    "activation": (change("hidden_act", "gelu"), r"hidden_act='gelu'.*Only models with hidden_act='silu'"),
    "rope": (
        change("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
        "RoPE scaling of type dynamic.*default, linear, llama3 and yarn",
    ),
    "number": (change("num_hidden_layers", "two"), "num_hidden_layers='two'"),
    "heads": (change("num_key_value_heads", 3), "4 query heads for 3 key/value heads"),
    "quantised": (change("quantization_config", {"quant_method": "gptq"}), "quantised by gptq"),
    "missing": (weights(lambda t: t.pop(NAME)), rf"lacks 1 of 21 tensors: {NAME}"),
    "extra": (
        weights(lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
        r"holds 1 tensors that its config does not ask for: \S*q_norm\.weight",
    ),
    "shape": (change("intermediate_size", 64), r"with shape \[48, 32\], and its config makes it \[64, 32\]"),
    "integers": (weights(lambda t: t.update({NAME: t[NAME].to(torch.int32)})), "as int32.*floating-point"),
    "truncated": (truncate, r"model\.safetensors is damaged"),
    "no-config": (lambda hf: (hf / "config.json").unlink(), r"holds no config\.json"),
    "no-json": (lambda hf: (hf / "config.json").write_text("{"), r"config\.json is not JSON"),
    "no-weights": (lambda hf: (hf / "model.safetensors").unlink(), "holds no weights"),
    "no-index": (
        lambda hf: (hf / "model.safetensors").rename(hf / "model-00001-of-00002.safetensors"),
        r"model\.safetensors\.index\.json is missing",
    ),
    "tokenizer": (big_tokenizer, "140 ids, and the model 131.*--no-tokenizer"),
    "code": (
        lambda hf: ((hf / "model.safetensors").unlink(), torch.save({"w": os.getcwd}, hf / "pytorch_model.bin")),
        r"pytorch_model\.bin cannot be loaded safely",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_import_refuses(name: str, hf: Path, tmp_path: Path) -> None:
    act, message = BAD[name]
    act(hf)
    with pytest.raises(ConvertError, match=message):
        import_model(hf, tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_shard_that_the_index_names_is_missing(tmp_path: Path) -> None:
    hf = models.saved(models.llama(**SHAPE), tmp_path / "hf", shard="20KB")
    (hf / "model-00002-of-00005.safetensors").unlink(missing_ok=True)
    next(iter(sorted(hf.glob("model-*")))).unlink()
    with pytest.raises(ConvertError, match=r"model-0000\d-of-.*is missing: model\.safetensors\.index\.json names it"):
        import_model(hf, tmp_path / "ours")


def test_places(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="nowhere does not exist"):
        import_model(tmp_path / "nowhere", tmp_path / "ours")
    with pytest.raises(ConvertError, match=r"is a file: its config\.json lies beside it"):
        import_model(hf / "model.safetensors", tmp_path / "ours")
    import_model(hf, tmp_path / "ours")
    with pytest.raises(ConvertError, match=r"ours exists.*Name a folder"):
        import_model(hf, tmp_path / "ours")
    with pytest.raises(ConvertError, match=r"ours exists.*Name a folder"):
        export_model(tmp_path / "ours", tmp_path / "ours")
    with pytest.raises(CheckpointError, match="hf holds no checkpoint"):
        export_model(hf, tmp_path / "back")
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        export_model(tmp_path / "nowhere", tmp_path / "back")
    with pytest.raises(ConvertError, match=r"--tokenizer .*hf holds no tokenizer"):
        export_model(tmp_path / "ours", tmp_path / "back", tokenizer=hf)
    (hf / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        import_model(hf, hf / "file" / "ours")


def test_damaged_checkpoint_is_not_exported(hf: Path, tmp_path: Path) -> None:
    import_model(hf, tmp_path / "ours")
    path = tmp_path / "ours" / "weights-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"weights-00000\.safetensors is damaged"):
        export_model(tmp_path / "ours", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "ours"]


def test_what_transformers_cannot_hold(tmp_path: Path) -> None:
    from toolkit.config.load import parse_config
    from toolkit.convert.architecture import foreign_config

    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 9}
    llama = parse_config({"model": {**shape, "qk_layernorm": True}}).model
    gpt = parse_config({"model": {**shape, "family": "gpt", "num_query_groups": 2, "head_dim": 6}}).model
    with pytest.raises(ConvertError, match=r"model\.qk_layernorm=true"):
        foreign_config(llama, dtype="float32")
    with pytest.raises(ConvertError, match=r"model\.num_query_groups=2, model\.head_dim=6: GPT-2"):
        foreign_config(gpt, dtype="float32")


def test_full_disk(hf: Path, tmp_path: Path) -> None:
    """A limit on file size stands for it: the message names the folder, and nothing is left."""
    script = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
from toolkit.convert.importing import import_model
from toolkit.convert.exporting import export_model
import_model(Path({str(hf)!r}), Path({str(tmp_path / "ours")!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for act in (lambda: import_model(Path({str(hf)!r}), Path({str(tmp_path / "full")!r})),
            lambda: export_model(Path({str(tmp_path / "ours")!r}), Path({str(tmp_path / "back")!r}))):
    try:
        act()
    except Exception as e:
        print(type(e).__name__, e)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if "cannot be written" in line]
    assert len(lines) == 2 and "file too large" in lines[0] and "ours" not in lines[1].split()[1], done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "ours"]


def test_command_line(hf: Path, tmp_path: Path) -> None:
    """One message, exit code 2 and no traceback; and the commands as the docs give them."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "toolkit.cli", "convert", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    bad = run("import", tmp_path / "nowhere", tmp_path / "ours")
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr
    good = run("import", hf, tmp_path / "ours", "--dtype", "bf16")
    assert good.returncode == 0 and "in bf16" in good.stdout and "toolkit train" in good.stdout, good.stderr
