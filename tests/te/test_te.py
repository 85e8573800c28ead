"""model.impl=te with Transformer Engine's modules played by plain PyTorch: the same run as
model.impl=local, to the last bit.

The stand-in (tests/te/stand_in) has Transformer Engine's names, shapes and attributes of
parameters, and computes. It shows that the project gives those parameters values, sums their
gradients, cuts, saves and converts them as it should. It says nothing about Transformer Engine's
kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.run import config_of
from tests.loop import tensors
from toolkit.checkpoint.manifest import discover
from toolkit.convert.exporting import export_model

GPT = {"model.family": "gpt", "model.num_query_groups": None, "model.ffn_hidden_size": None, "model.tie_embeddings": True}
TP_SP = {"parallel.tp": 2, "parallel.sequence_parallel": True}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "llama tp2 sp qknorm zero0": (2, TP_SP | {"model.qk_layernorm": True, "zero.stage": 0}),
    "gpt tp2 sp zero3 recompute": (2, GPT | TP_SP | {"zero.stage": 3, "train.recompute": "selective"}),
}
LONG: dict[str, tuple[int, dict[str, Any]]] = {
    "llama zero1": (1, {"zero.stage": 1}),
    "llama tp2 zero2": (2, {"parallel.tp": 2, "zero.stage": 2}),
    "llama pp2 vpp2 bf16": (
        2,
        {"parallel.pp": 2, "parallel.vpp": 2, "zero.stage": 1, "train.precision": "bf16", "train.recompute": "full"},
    ),
    "gpt dp2 zero3": (2, GPT | {"zero.stage": 3}),
    "gpt tp2 sp zero1 qknorm": (2, GPT | TP_SP | {"zero.stage": 1, "model.qk_layernorm": True}),
}
# a run saved with one kind of layers in one layout goes on with the other kind in another layout
FIRST = {"te": (2, GPT | TP_SP | {"zero.stage": 1}), "local": (2, {"zero.stage": 3})}
SECOND = {"te": (2, GPT | {"zero.stage": 3}), "local": (2, TP_SP | {"zero.stage": 1})}
OTHER = {"te": "local", "local": "te"}
NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}


def calls(folder: Path, *, long: bool) -> dict[str, Any]:
    """Everything that is asked of the processes that have the stand-in, in the order in which it is done."""
    asked: dict[str, Any] = {}

    def raw(run: str, impl: str, keys: dict[str, Any], *, steps: int, **checkpoint: Any) -> dict[str, Any]:
        given = config_of(folder / run, keys | {"model.impl": impl, "optimizer.schedule": "constant"}, steps=steps, checkpoint=checkpoint)
        given["model"] = {k: v for k, v in given["model"].items() if v is not None}
        return given

    for name, (world, keys) in (RUNS | (LONG if long else {})).items():
        for impl in OTHER:
            asked[f"{name} {impl}"] = ["steps", world, raw("none", impl, keys, steps=3)]
    for family, keys in (("llama", {}), ("gpt", GPT)):
        for impl in OTHER:
            asked[f"built {family} {impl}"] = ["built", 1, raw("none", impl, keys, steps=1)]
    for impl, other in OTHER.items():
        world, keys = FIRST[impl]
        asked[f"saved {impl}"] = ["train", world, raw(f"saved-{impl}", impl, keys, steps=2, every=2)]
        asked[f"whole {impl}"] = ["train", world, raw(f"whole-{impl}", other, keys, steps=4, every=2, keep=2)]
        world, keys = SECOND[impl]
        asked[f"resumed {impl}"] = ["train", world, raw(f"saved-{impl}", other, keys, steps=4)]
        start = str(folder / f"whole-{impl}/checkpoints/step-00000002")
        for one in OTHER:
            asked[f"started {impl} {one}"] = ["train", world, raw(f"started-{impl}", one, keys, steps=1, init_from=start)]
    return asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("te")


@pytest.fixture(scope="module")
def found(folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    asked, answers = folder / "calls.json", folder / "answers.json"
    asked.write_text(json.dumps(calls(folder, long=request.config.getoption("--all-cells"))))
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "stand_in"), str(root)])}
    command = [sys.executable, "-m", "tests.te.run", str(asked), str(answers)]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(answers.read_text())


def answer(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Each rank's answer."""
    assert isinstance(found[name], list), found[name]
    return found[name]


@pytest.mark.parametrize("name", [*RUNS, *(pytest.param(name, marks=pytest.mark.all_cells) for name in LONG)])
def test_the_same_training(name: str, found: dict[str, Any]) -> None:
    te, local = answer(found, f"{name} te"), answer(found, f"{name} local")
    assert "TELayerNormColumnParallelLinear" in te[0]["modules"] and "TENorm" not in local[0]["modules"]
    assert not {m for m in local[0]["modules"] if m.startswith("TE")}
    for ours, theirs in zip(te, local, strict=True):
        assert ours["losses"] == theirs["losses"] and ours["digests"] == theirs["digests"]
        # summed in the order of the parameters, which is not the same
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_values_as_they_are_made(family: str, found: dict[str, Any]) -> None:
    """Norms within a linear layer are vectors of 1 and 0, matrices are normal, and ZeRO-3 never
    sees two whole weights.
    """
    te, local = (answer(found, f"built {family} {impl}")[0] for impl in OTHER)
    seen = set()
    for name, values in te["parameters"].items():
        inner = name.partition("decoder.layers.")[2].partition(".")[2]
        if inner in NORMS:
            seen.add(inner)
            assert values == [[32], 1.0 if inner.endswith("weight") else 0.0, 0.0], name
        theirs = name.replace(inner, NORMS[inner]) if inner in NORMS else name
        assert values == local["parameters"][theirs], name
    assert len(te["parameters"]) == len(local["parameters"]) and len(seen) == (4 if family == "gpt" else 2)
    # the largest weight twice, drawn and cut, and small ones; all weights are five times as much
    assert te["peak"] < 1.2 * local["peak"] < 90_000


@pytest.mark.parametrize("impl", ["te", "local"])
def test_checkpoints_of_one_are_the_others(impl: str, found: dict[str, Any], folder: Path) -> None:
    """A run saved with one kind of layers goes on with the other kind in another layout; whole: the
    other kind from the start.
    """
    saved, resumed, whole = (answer(found, f"{name} {impl}")[0] for name in ("saved", "resumed", "whole"))
    assert saved["losses"] == whole["losses"][:2] and resumed["first"] == 3
    assert resumed["losses"] == pytest.approx(whole["losses"][2:], rel=1e-5)
    assert resumed["norms"] == pytest.approx(whole["norms"][2:], rel=1e-4)


@pytest.mark.parametrize("impl", ["te", "local"])
def test_a_run_starts_from_the_others_weights(impl: str, found: dict[str, Any]) -> None:
    te, local = (answer(found, f"started {impl} {one}")[0] for one in OTHER)
    assert te["first"] == 1 and te["losses"] == local["losses"] and te["digests"] == local["digests"]


@pytest.mark.parametrize("impl", ["te", "local"])
def test_exports_are_the_same(impl: str, found: dict[str, Any], folder: Path) -> None:
    """What other software reads does not tell which kind of layers made it."""
    answer(found, f"whole {impl}"), answer(found, f"saved {impl}")
    exported = []
    for run in ("saved", "whole"):
        (step,) = (f.path for f in discover(folder / f"{run}-{impl}/checkpoints") if f.path.name == "step-00000002")
        export_model(step, folder / f"exported-{run}-{impl}")
        exported.append(tensors(folder / f"exported-{run}-{impl}"))
    assert exported[0] == exported[1] and any("norm" in name or "ln_1" in name for name in exported[0])
