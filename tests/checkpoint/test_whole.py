"""Weights-only checkpoints, and parts of whole tensors; test_move.py reads real ones of every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.checkpoint.manifest import read_manifest, verify_files
from toolkit.checkpoint.weights import WeightsWriter, weights_manifest
from toolkit.checkpoint.whole import MASTER, WholeCheckpoint
from toolkit.config.load import parse_config
from toolkit.errors import CheckpointError
from toolkit.model.init import cut_out

# -- weights only -------------------------------------------------------------------------------------


MODEL = {"num_layers": 11, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 16}


def weights(folder: Path, tensors: dict[str, torch.Tensor], **sizes: int) -> Path:
    model = MODEL
    manifest = weights_manifest(parse_config({"run": {"dir": str(folder)}, "model": model}), step=7)
    with WeightsWriter(folder, manifest, **sizes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return folder


TENSORS = {
    "output_layer.weight": torch.randn(16, 8).bfloat16(),
    "decoder.layers.10.mlp.linear_fc1.weight": torch.randn(24, 8).half(),
    "decoder.layers.2.self_attention.linear_proj.weight": torch.randn(8, 8),
    "decoder.final_layernorm.weight": torch.randn(8),
    "embedding.word_embeddings.weight": torch.randn(16, 8).bfloat16(),
}


@pytest.mark.parametrize("shard_bytes", [1, 300, 1 << 20])
def test_weights_only_come_back(shard_bytes: int, tmp_path: Path) -> None:
    folder = weights(tmp_path / "a/b", TENSORS, shard_bytes=shard_bytes)
    manifest = read_manifest(folder)
    assert manifest.weights_only and manifest.step == 7 and len(manifest.files) == {1: 5, 300: 4, 1 << 20: 1}[shard_bytes]
    assert verify_files(folder, manifest.files) == "" and {p.name for p in folder.parent.iterdir()} == {"b"}
    whole = WholeCheckpoint(folder)
    assert whole.names == [[*TENSORS][i] for i in (4, 2, 1, 3, 0)]
    for name, tensor in TENSORS.items():
        assert whole.keys(name) == (MASTER,) and whole.shape(name) == list(tensor.shape)
        assert whole.read(name).dtype == tensor.dtype and torch.equal(whole.read(name), tensor)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> WholeCheckpoint:
    return WholeCheckpoint(weights(tmp_path_factory.mktemp("part") / "w", TENSORS))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_part_of_a_part(opened: WholeCheckpoint, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(TENSORS)))
    tp = data.draw(st.sampled_from([1, 2, 4]))
    rank = data.draw(st.integers(0, tp - 1))
    cut = parse_config({"model": MODEL}).model.spec.weight(name).cut
    part = cut_out(cut, TENSORS[name], tp=tp, rank=rank).flatten()
    start = data.draw(st.integers(0, len(part) - 1))
    end = data.draw(st.integers(start + 1, len(part)))
    out = torch.empty(end - start, dtype=part.dtype)
    opened.read_into(out, name, tp=tp, rank=rank, start=start)
    assert torch.equal(out, part[start:end])


def test_no_run_resumes_from_weights_alone(tmp_path: Path) -> None:
    from toolkit.checkpoint.resume import _check

    folder = weights(tmp_path / "step-00000007", TENSORS)
    with pytest.raises(CheckpointError, match=r"holds weights without optimizer states.*set checkpoint\.init_from to it"):
        _check(read_manifest(folder), folder, {}, None)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), WeightsWriter(tmp_path / "w", read_manifest(weights(tmp_path / "good", TENSORS))) as writer:
        writer.add("output_layer.weight", torch.ones(3))
        raise ZeroDivisionError
    assert {p.name for p in tmp_path.iterdir()} == {"good"}
    with pytest.raises(CheckpointError, match="good exists"):
        weights(tmp_path / "good", TENSORS)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        WholeCheckpoint(tmp_path)
    folder = weights(tmp_path / "w", TENSORS)
    path = folder / "weights-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"weights-00000\.safetensors is damaged"):
        WholeCheckpoint(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"weights-00000\.safetensors cannot be read: no such file"):
        WholeCheckpoint(folder)
