"""A run that moves from layout to layout goes on as one that never moved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint import synthetic
from tests.checkpoint.run import config_of
from tests.checkpoint.runs import Run, metrics, write_config
from tests.parity.cells import BOUNDS
from tests.pool import CellFailed, Pool
from toolkit.arch.optimizers import OPTIMIZERS
from toolkit.arch.spec import Cut
from toolkit.checkpoint.identity import check_same_states
from toolkit.checkpoint.manifest import discover, read_manifest, verify_files, write_manifest
from toolkit.checkpoint.reshard import reshard
from toolkit.checkpoint.target import Target
from toolkit.checkpoint.whole import MASTER, WholeCheckpoint, layout_of_manifest, model_spec
from toolkit.config.load import load_config, override_config
from toolkit.data.loader import batches
from toolkit.errors import CheckpointError
from toolkit.model.init import cut_out
from toolkit.parallel.layout import Layout
from toolkit.tensors import read_tensors
from toolkit.train.resolve import resolve

TRAIN = "tests.checkpoint.run:train"
SYNTHETIC = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 32, "vocab_size": 100}
LEG = 2  # steps in each layout: the second one's loss has seen the optimizer states, too


def leg(world: int, stage: int, **keys: Any) -> tuple[int, dict[str, Any]]:
    return world, {"zero.stage": stage} | {k.replace("__", "."): v for k, v in keys.items()}


TP, PP = {"parallel__tp": 2}, {"parallel__pp": 2}
CPU = {"zero__offload_optimizer": "cpu"}
CHAINS: dict[str, tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]] = {
    "llama": (
        {},
        [
            leg(2, 1, **TP),
            leg(2, 2, **PP),
            leg(2, 3),
            leg(2, 1, **TP, parallel__sequence_parallel=True),
            leg(4, 1, **PP, parallel__vpp=2),
            leg(4, 2, **TP, parallel__cp=2),
            leg(1, 0),
            leg(2, 3, **CPU, zero__offload_param="cpu"),
            leg(4, 3, **TP, **PP, zero__deepspeed={"zero_optimization": {"sub_group_size": 3000}}),
            leg(2, 0),
        ],
    ),
    "tied": ({"model.tie_embeddings": True}, [leg(2, 2, **PP), leg(2, 3, **TP), leg(4, 1, **PP, parallel__cp=2), leg(2, 1, **CPU)]),
    "gpt": (
        {"model.family": "gpt", "model.num_query_groups": 4, "model.qk_layernorm": True, "model.vocab_multiple": 6},
        [leg(2, 3), leg(4, 1, **TP, **PP), leg(2, 2)],
    ),
    "bf16": (
        {"train.precision": "bf16"},
        [leg(2, 1), leg(2, 1, **TP, train__precision="fp32"), leg(2, 3, **PP, train__precision="bf16")],
    ),
    # the loss scale doubles in every other step: it must be brought along
    "fp16": (
        {"train.precision": "fp16", "zero.deepspeed": {"fp16": {"initial_scale_power": 6, "loss_scale_window": 2}}},
        [leg(2, 2), leg(2, 1, **TP)],
    ),
    "context": (
        {"data.document_mask": True},
        [leg(2, 1, parallel__cp=2), leg(4, 3, parallel__cp=4), leg(4, 2, parallel__cp=2, parallel__cp_exchange="ring", **PP), leg(1, 0)],
    ),
    "uneven": ({"model.num_layers": 6}, [leg(4, 1, parallel__pp=4), leg(2, 3, **PP, parallel__vpp=2), leg(1, 0)]),
    # three layers: data-parallel ranks' partitions then meet within a matrix
    "muon": ({"optimizer.name": "muon", "model.num_layers": 3}, [leg(2, 1, **TP), leg(4, 1), leg(2, 0, **PP), leg(4, 1, **TP), leg(1, 1)]),
    "sgd": ({"optimizer.name": "sgd"}, [leg(2, 1, **TP), leg(2, 3), leg(2, 2, **PP)]),
    "nvme": ({}, [leg(2, 1, **TP), leg(2, 3, zero__offload_optimizer="nvme", zero__offload_param="nvme"), leg(1, 1)]),
}


def run(pool: Pool, folder: Path, base: dict[str, Any], one: tuple[int, dict[str, Any]], *, steps: int) -> dict[str, Any]:
    world, keys = one
    keys = {"optimizer.decay_steps": 40, **base, **keys}
    return pool.run(TRAIN, world, config_of(folder, keys, steps=steps, checkpoint={"every": LEG, "keep": 99}), deadline_s=300)[0]


@pytest.mark.parametrize("chain", [pytest.param(c, marks=[pytest.mark.all_cells] if c in ("nvme", "context") else []) for c in CHAINS])
def test_a_run_that_moves(chain: str, pool: Pool, tmp_path: Path, compiled: Callable[[dict[str, Any]], None]) -> None:
    base, legs = CHAINS[chain]
    for _, keys in legs:
        compiled(keys)
    loss, norm = BOUNDS[base.get("train.precision", "fp32")]
    unmoved = run(pool, tmp_path / "unmoved", base, leg(1, 1), steps=LEG * len(legs))
    for i, one in enumerate(legs):
        moved = run(pool, tmp_path / "moved", base, one, steps=LEG * (i + 1))
        assert moved["first"] == LEG * i + 1
        part = slice(LEG * i, LEG * (i + 1))
        assert moved["losses"] == pytest.approx(unmoved["losses"][part], rel=loss), one
        assert moved["norms"] == pytest.approx(unmoved["norms"][part], rel=norm), one
        step = tmp_path / f"moved/checkpoints/step-{LEG * (i + 1):08d}"
        check_whole(step)
        check_same_files(step, resharded(step, tmp_path / f"again-{i}", like=step))
    if chain == "fp16":
        assert moved["scale"] == unmoved["scale"] > 2**6


def test_offline_and_on_the_fly_are_the_same(pool: Pool, tmp_path: Path) -> None:
    """What was cut beforehand is read back rank by rank, and gives the bits of the run that cut it
    while loading.
    """
    base = {"train.precision": "bf16", "model.dropout": 0.1, "model.tie_embeddings": True}
    run(pool, tmp_path / "source", base, leg(2, 1, **TP), steps=LEG)
    there = leg(4, 3, **PP)
    shutil.copytree(tmp_path / "source", tmp_path / "fly")
    fly = run(pool, tmp_path / "fly", base, there, steps=2 * LEG)
    first = tmp_path / f"source/checkpoints/step-{LEG:08d}"
    resharded(first, tmp_path / "offline/checkpoints", like=tmp_path / f"fly/checkpoints/step-{2 * LEG:08d}")
    assert not check_cut(tmp_path / "fly", tmp_path / "offline")
    offline = run(pool, tmp_path / "offline", base, there, steps=2 * LEG)
    assert offline == fly and offline["first"] == LEG + 1


@pytest.mark.parametrize(("stage", "key"), [(2, {"round_robin_gradients": True}), (3, {"sub_group_size": 3000})])
def test_the_same_layout_cut_otherwise(stage: int, key: dict[str, Any], pool: Pool, tmp_path: Path) -> None:
    """DeepSpeed's own keys change what lies where in the same layout: seen in the files, and
    nothing but the way of reading changes.
    """
    base = {"model.dropout": 0.1, "model.num_layers": 2}
    whole = run(pool, tmp_path, base, leg(2, stage), steps=2 * LEG)
    shutil.rmtree(tmp_path / f"checkpoints/step-{2 * LEG:08d}")
    moved = run(pool, tmp_path, base, leg(2, stage, zero__deepspeed={"zero_optimization": key}), steps=2 * LEG)
    assert moved["first"] == LEG + 1 and moved["losses"] == pytest.approx(whole["losses"][LEG:], rel=1e-6)
    first, second = (tmp_path / f"checkpoints/step-{n * LEG:08d}" for n in (1, 2))
    files = [[(p.name, read_tensors(p)[1]["fragments"]) for p in sorted(f.glob("*.group-*"))] for f in (first, second)]
    assert files[0] != files[1]


def test_states_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    manifest = read_manifest(synthetic.write(tmp_path / "run", SYNTHETIC))
    config = override_config(manifest.config, ["optimizer.name=adam"])
    check_same_states(manifest, config, path=tmp_path)
    config = override_config(manifest.config, ["optimizer.name=muon"])
    text = r"optimizer\.name=adamw \(exp_avg, exp_avg_sq\), and this run's muon keeps momentum_buffer, exp_avg, exp_avg_sq"
    with pytest.raises(CheckpointError, match=text):
        check_same_states(manifest, config, path=tmp_path)


def test_states_of_an_optimizer_that_was_plugged_in_are_refused_without_it(pool: Pool, tmp_path: Path) -> None:
    """Its config names another one: here, sgd's states under adamw's name."""
    run(pool, tmp_path, {"optimizer.name": "sgd", "model.num_layers": 1}, leg(1, 1), steps=LEG)
    folder = tmp_path / f"checkpoints/step-{LEG:08d}"
    manifest = read_manifest(folder)
    section = manifest.config["optimizer"] | {"name": "adamw"}
    write_manifest(folder, manifest.model_copy(update={"config": manifest.config | {"optimizer": section}}))
    for one in (leg(1, 1), leg(2, 1)):
        with pytest.raises(CellFailed, match="has the states momentum_buffer, and this run's adamw keeps exp_avg, exp_avg_sq"):
            run(pool, tmp_path, {"model.num_layers": 1}, one, steps=2 * LEG)


def check_cut(one: Path, other: Path) -> set[str]:
    """Files that one run's last checkpoint and another's first do not share by name."""
    return {p.name for p in (one / f"checkpoints/step-{2 * LEG:08d}").iterdir()} ^ {
        p.name for p in (other / f"checkpoints/step-{LEG:08d}").iterdir()
    }


def check_whole(folder: Path) -> None:
    """Every fragment in every file is that part of the whole tensor."""
    with WholeCheckpoint(folder) as whole:
        layout, steps, spec = layout_of_manifest(whole.manifest), whole.manifest.step, model_spec(whole.manifest)
        optimizer = OPTIMIZERS[whole.manifest.config["optimizer"]["name"]]
        counts = any(group.rule.counts for group in optimizer.groups)
        assert whole.numbers["step"] == (steps if counts else None) and whole.numbers["counters"]["global_steps"] == steps
        assert whole.names[0] == "embedding.word_embeddings.weight" and len(whole.names) == len(set(whole.names))
        layers = [int(n.split(".")[2]) for n in whole.names if ".layers." in n]
        assert layers == sorted(layers) and set(layers) == set(range(whole.manifest.config["model"]["num_layers"]))
        seen = set()
        for path in folder.glob("*.group-*"):
            tensors, metadata = read_tensors(path)
            tp, parameters = layout.coordinates(int(path.name[5:10])).tp, json.loads(metadata["parameters"])
            for name, start, at, count in json.loads(metadata["fragments"]):
                cut = Cut(parameters[name]["dim"], parameters[name]["blocks"])
                assert cut == spec.weight(name).cut, name
                rule = optimizer.groups[optimizer.group_of(spec.weight(name).group)].rule
                assert set(whole.keys(name)) == {MASTER, *rule.states} and whole.dtype(name) == torch.float32
                for key in whole.keys(name):
                    part = cut_out(cut, whole.read(name, key), tp=layout.tp, rank=tp)
                    assert list(part.shape) == parameters[name]["shape"]
                    assert torch.equal(part.flatten()[start : start + count], tensors[key][at : at + count]), (name, key)
                seen.add(name)
        assert seen == set(whole.names)


def resharded(source: Path, out: Path, *, like: Path, workers: int = 1) -> Path:
    """`source` cut as `like` is, without an engine."""
    manifest = read_manifest(like)
    target = Target(override_config(manifest.config, []), layout_of_manifest(manifest))
    return reshard(source, out, target, workers=workers)


def check_same_files(one: Path, other: Path) -> None:
    """Equal tensors, numbers and descriptions in files of equal names."""
    names = {p.name for p in one.iterdir()}
    assert names == {p.name for p in other.iterdir()}
    manifest = read_manifest(other)
    assert verify_files(other, manifest.files) == "" and {f.name for f in manifest.files} | {"manifest.json"} == names
    for name in names - {"manifest.json"}:
        (tensors, metadata), (there, metadata_there) = read_tensors(one / name), read_tensors(other / name)
        assert {k: json.loads(v) for k, v in metadata.items()} == {k: json.loads(v) for k, v in metadata_there.items()}, name
        assert tensors.keys() == there.keys(), name
        for key, value in tensors.items():
            assert value.dtype == there[key].dtype and torch.equal(value, there[key]), (name, key)


# -- the same global batch on any number of data-parallel ranks ------------------------------------------


class Ids:
    """Samples that are their own number."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {"text": np.array([i, i])}


def test_the_same_samples_in_every_step(text: Path, tmp_path: Path) -> None:
    """Real runs on 1, 4 and 2 data-parallel ranks in one chain: micro-batches of 4, 1 and 2 are
    derived, and the losses are one run's.
    """
    config = write_config(tmp_path, text, steps=2, every=2, keep=9)
    same = ("optimizer.schedule=constant", "train.micro_batch_size=4", "model.dropout=0")
    assert (one := Run(config, *same, "train.steps=6", f"run.dir={tmp_path / 'one'}")).wait() == 0, one.text()
    seen = []
    for ranks, steps in ((1, 2), (4, 4), (2, 6)):
        layout = resolve(load_config(config, [*same, f"train.steps={steps}"]), ranks).layout
        consumed = sum(f.step == steps - 2 and f.manifest.consumed_samples for f in discover(tmp_path / "run/checkpoints") if f.manifest)
        seen += step_ids(layout, consumed=consumed, steps=2)
        assert (moved := Run(config, *same, f"train.steps={steps}", ranks=ranks)).wait() == 0, moved.text()
        assert (f"resuming with {4 // ranks} and 1 micro-batches" in moved.text()) == (ranks > 1)
    assert seen == step_ids(Layout(micro_batch_size=4, num_microbatches=1), consumed=0, steps=6)
    for (step, loss, norm), (_, there, norm_there) in zip(metrics(tmp_path / "run"), metrics(tmp_path / "one"), strict=True):
        assert loss == pytest.approx(there, rel=1e-5) and norm == pytest.approx(norm_there, rel=1e-4), step


def step_ids(layout: Layout, *, consumed: int, steps: int) -> list[list[int]]:
    """The samples of each step, as the ranks' readers give them."""
    ranks = [batches(Ids(), layout=layout, dp_rank=r, global_batch_size=4, consumed_samples=consumed) for r in range(layout.dp)]
    return [[int(i) for r in ranks for _ in range(layout.num_microbatches) for i in next(r)["tokens"][:, 0]] for _ in range(steps)]


def test_what_auto_says(text: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, text, steps=2, every=2)
    assert (first := Run(config)).wait() == 0, first.text()
    again = Run(config, "optimizer.schedule=constant", "train.steps=4", "zero.stage=3", "checkpoint.resume=must", ranks=2)
    assert again.wait() == 0, again.text()
    expected = "it was saved by 1 process with dp=1, zero.stage=1, and this run has dp=2, zero.stage=3: resharding on the fly"
    assert expected in again.text() and "dropout's generators are seeded anew from run.seed and step 2" in again.text()
    assert [m[0] for m in metrics(tmp_path / "run")] == [1, 2, 3, 4]
