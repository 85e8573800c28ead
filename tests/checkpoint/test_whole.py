"""Any checkpoint read as whole tensors, and the weights-only kind that is written so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.run import config_of
from tests.pool import Pool
from toolkit.checkpoint.manifest import read_manifest, verify_files
from toolkit.checkpoint.tensors import read_tensors
from toolkit.checkpoint.weights import WeightsWriter, weights_manifest
from toolkit.checkpoint.whole import MASTER, WholeCheckpoint, layout_of_manifest
from toolkit.config.load import parse_config
from toolkit.errors import CheckpointError
from toolkit.model.init import Shard, known_shard

STEP = "checkpoints/step-00000002"
GPT = {"model.family": "gpt", "model.num_query_groups": 4, "model.qk_layernorm": True}

SOURCES: dict[str, tuple[int, dict[str, Any]]] = {
    "llama tp2 pp2 zero1 tied": (4, {"zero.stage": 1, "parallel.tp": 2, "parallel.pp": 2, "model.tie_embeddings": True}),
    "gpt tp2 zero3 dp2 bf16": (4, {"zero.stage": 3, "parallel.tp": 2, "train.precision": "bf16"} | GPT),
    "llama vpp2 zero2 offload": (4, {"zero.stage": 2, "parallel.pp": 2, "parallel.vpp": 2, "zero.offload_optimizer": "cpu"}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_real_checkpoint_as_whole_tensors(source: str, pool: Pool, tmp_path: Path, compiled: Callable[[dict[str, Any]], None]) -> None:
    world, keys = SOURCES[source]
    compiled(keys)
    pool.run("tests.checkpoint.run:train", world, config_of(tmp_path, keys, steps=2, checkpoint={"every": 2}), deadline_s=300)
    whole = WholeCheckpoint(tmp_path / STEP)
    layout, gated = layout_of_manifest(whole.manifest), keys.get("model.family") != "gpt"
    assert whole.numbers["step"] == 2 and whole.numbers["counters"]["global_steps"] == 2
    assert whole.names[0] == "embedding.word_embeddings.weight" and len(whole.names) == len(set(whole.names))
    assert (whole.names[-1] == "output_layer.weight") != keys.get("model.tie_embeddings", False)
    layers = [int(n.split(".")[2]) for n in whole.names if ".layers." in n]
    assert layers == sorted(layers) and set(layers) == {0, 1, 2, 3}
    seen = 0
    for path in (tmp_path / STEP).glob("*.group-*"):
        tensors, metadata = read_tensors(path)
        tp = layout.coordinates(int(path.name[5:10])).tp
        for name, start, at, count in json.loads(metadata["fragments"]):
            cut = json.loads(metadata["parameters"])[name]
            shard = Shard(cut["dim"], cut["blocks"])
            assert shard == known_shard(name, gated=gated), name
            assert set(whole.keys(name)) == {MASTER, "exp_avg", "exp_avg_sq"} and whole.dtype(name) == torch.float32
            for key in whole.keys(name):
                part = shard.cut(whole.read(name, key), tp=layout.tp, rank=tp)
                assert list(part.shape) == cut["shape"]
                assert torch.equal(part.flatten()[start : start + count], tensors[key][at : at + count]), (name, key)
            seen += 1
    assert seen >= len(whole.names)


# -- weights only -------------------------------------------------------------------------------------


def weights(folder: Path, tensors: dict[str, torch.Tensor], **sizes: int) -> Path:
    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 16}
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
    part = known_shard(name, gated=True).cut(TENSORS[name], tp=tp, rank=rank).flatten()
    start = data.draw(st.integers(0, len(part) - 1))
    end = data.draw(st.integers(start + 1, len(part)))
    out = torch.empty(end - start, dtype=part.dtype)
    opened.read_into(out, name, tp=tp, rank=rank, start=start)
    assert torch.equal(out, part[start:end])


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
