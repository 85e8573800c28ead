"""A checkpoint that an earlier version saved is read, resumed and moved: what users keep must
outlive what we change.

stored/step-00000002 is of TP 2 × ZeRO-2 in fp32, saved before model.qkv_bias and
model.sliding_window were keys.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.run import config_of
from tests.pool import Pool
from toolkit.checkpoint.manifest import read_manifest, verify_files
from toolkit.checkpoint.whole import WholeCheckpoint, model_spec

STORED = Path(__file__).parent / "stored" / "step-00000002"
# what the version that saved it went on with in steps 3 and 4
LOSSES, NORMS = (4.093204975128174, 4.094154357910156), (0.5366493463516235, 0.4431619942188263)
KEYS: dict[str, Any] = {
    "model.num_layers": 2,
    "model.hidden_size": 16,
    "model.num_attention_heads": 2,
    "model.num_query_groups": 2,
    "model.ffn_hidden_size": 32,
    "model.vocab_size": 60,
    "model.vocab_multiple": 4,
    "model.attention_bias": True,
    "optimizer.decay_steps": 40,
}
SAME = {"parallel.tp": 2, "zero.stage": 2}


def test_it_is_whole_and_its_model_is_known() -> None:
    manifest = read_manifest(STORED)
    assert verify_files(STORED, manifest.files) == "" and "model.qkv_bias" not in manifest.identity
    with WholeCheckpoint(STORED) as whole:
        spec = model_spec(manifest)
        assert {n: tuple(whole.shape(n)) for n in whole.names} == {w.name: w.shape for w in spec.weights()}


@pytest.mark.parametrize(
    ("world", "layout"), [(2, SAME), (1, {"zero.stage": 1}), (2, {"parallel.pp": 2, "zero.stage": 3})], ids=["same", "one", "pp2-zero3"]
)
def test_it_is_resumed(world: int, layout: dict[str, Any], pool: Pool, tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "run/checkpoints" / STORED.name)
    config = config_of(tmp_path / "run", KEYS | layout, steps=4, checkpoint={"every": 9, "resume": "must"})
    found = pool.run("tests.checkpoint.run:train", world, config, deadline_s=180)[0]
    assert found["first"] == 3
    assert found["losses"] == pytest.approx(LOSSES, rel=1e-5) and found["norms"] == pytest.approx(NORMS, rel=1e-4)
