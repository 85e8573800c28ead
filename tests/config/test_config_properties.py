"""Thousands of damaged configs: a legal layout or one clear ToolkitError, never another exception."""

from __future__ import annotations

import copy
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from toolkit.config.describe import keys
from toolkit.config.load import dump_config, load_config, parse_config
from toolkit.config.yaml_text import read_yaml
from toolkit.errors import ToolkitError
from toolkit.parallel.case import Machine
from toolkit.parallel.deepspeed_json import deepspeed_config
from toolkit.parallel.layout import Layout
from toolkit.parallel.rules import check

GPU = Machine(cuda=True, transformer_engine=True)
many = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

BASE: dict[str, Any] = {
    "run": {"dir": "runs/x", "seed": 3},
    "model": {
        "family": "llama",
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "parallel": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "zero": {"stage": 1, "offload_optimizer": "none"},
    "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 1, "seq_length": 32, "precision": "bf16"},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "schedule": "cosine"},
    "data": {"split": [98, 1, 1], "blend": {"a": 1.0, "b": 2.0}},
    "log": {"csv": True},
}
JSON: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.5,
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "loss_scale": 0},
    "zero_optimization": {
        "stage": "auto",
        "reduce_bucket_size": "auto",
        "zero_hpz_partition_size": "auto",
        "offload_optimizer": {"device": "none", "nvme_path": None, "ratio": 1.0},
        "offload_param": {"device": "auto"},
    },
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.99], "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_min_lr": 0}},
    "tensorboard": {"enabled": False},
    "aio": {"block_size": 1024},
    "elasticity": {"enabled": False},
    "steps_per_print": 5,
}

loop: list[Any] = []
loop.append(loop)
deep: Any = 1
for _ in range(2000):
    deep = [deep]
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 4, 7, 31, 2**31, 10**400, -(10**400), 0.5, -0.0, 1e308, 1e-320, float("inf"), float("nan")),
    *(
        "",
        "auto",
        "none",
        "cpu",
        "nvme",
        "te",
        "gpt",
        "fp16",
        "1e-3",
        "llama2-7b",
        "gpt2-124",
        "a\0b",
        "\ud800",
        "é" * 300,
        "../x",
        "3",
        " ",
    ),
    *(
        [],
        [1],
        [1, 2, 3],
        [0.9, 0.95],
        [None],
        {},
        {"a": 1},
        {1: 2},
        {"enabled": True},
        {"device": "cpu"},
        {"type": "Adam"},
        {"x": {"y": "auto"}},
    ),
    *((), (1, 2), {1, 2}, b"\xff", datetime.date(2024, 1, 1), object(), complex(1, 2), loop, deep),
]
NAMES = [
    "step",
    "sage",
    "tp",
    "",
    "hidden-size",
    "auto",
    "zero",
    "\ud800",
    "model",
    "deepspeed",
    "config",
    "rope_type",
    "preset",
    "zero_optimisation",
    1,
    None,
    (1,),
]


def places(tree: Any) -> list[tuple[Any, ...]]:
    """The path of every key in a mapping of mappings."""
    if not isinstance(tree, dict):
        return []
    return [path for key, inner in tree.items() for path in [(key,), *((key, *rest) for rest in places(inner))]]


def junk(index: int) -> Any:
    value = JUNK[index % len(JUNK)]
    return copy.deepcopy(value) if isinstance(value, dict) else value  # later mutations must not reach into the pool


def damaged(tree: dict[str, Any], mutations: list[tuple[int, int, int]]) -> dict[str, Any]:
    """A copy with keys replaced by junk, deleted, renamed or added."""
    tree = copy.deepcopy(tree)
    for where, kind, what in mutations:
        paths = places(tree)
        if not paths:
            break
        *parents, name = paths[where % len(paths)]
        holder: Any = tree
        for parent in parents:
            holder = holder[parent]
        match kind % 5:
            case 0 | 1:
                holder[name] = junk(what)
            case 2:
                del holder[name]
            case 3:
                holder[NAMES[what % len(NAMES)]] = holder.pop(name)
            case 4:
                holder[NAMES[what % len(NAMES)]] = junk(what // len(NAMES))
    return tree


def outcome(make: Any, world_size: int) -> Layout | None:
    """Run the whole way to DeepSpeed's JSON; a refusal must say something that any terminal and
    file can hold.
    """
    try:
        config = make()
        layout = check(config, world_size, machine=GPU)
        result = deepspeed_config(config, layout)
    except ToolkitError as e:
        assert str(e).strip() and e.what
        str(e).encode("utf-8")
        return None
    assert layout.world_size == world_size
    json.dumps(result, allow_nan=False)
    assert parse_config(read_yaml(dump_config(config), source="dump")) == config
    return layout


mutations = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 4), st.integers(0, 2**16)), min_size=1, max_size=4)
worlds = st.sampled_from([1, 2, 3, 4, 6, 8, 64])


def test_the_undamaged_configs_are_legal() -> None:
    assert outcome(lambda: parse_config(BASE), 4) == Layout(tp=2, pp=2, sequence_parallel=True, num_microbatches=8)
    with_json = {**BASE, "zero": {"deepspeed": JSON}, "optimizer": {}}
    assert outcome(lambda: parse_config(with_json), 8) is not None


@settings(many, max_examples=examples(3000))
@given(mutations, worlds)
def test_damaged_mappings(mutated: list[tuple[int, int, int]], world_size: int) -> None:
    outcome(lambda: parse_config(damaged(BASE, mutated)), world_size)


@settings(many, max_examples=examples(2000))
@given(mutations, worlds)
def test_damaged_deepspeed_jsons(mutated: list[tuple[int, int, int]], world_size: int) -> None:
    raw = {"model": BASE["model"], "train": {"global_batch_size": 64}, "zero": {"deepspeed": damaged(JSON, mutated)}}
    outcome(lambda: parse_config(raw), world_size)


TEXT = yaml.safe_dump(BASE, sort_keys=False) + "zero2: &anchor {a: *anchor}\n"
PIECES = [
    "\t",
    "  ",
    ":",
    "- ",
    "{",
    "}",
    "[",
    "]",
    '"',
    "'",
    "&a ",
    "*a",
    "!!int ",
    "!!binary ",
    "!!timestamp x",
    "!!python/name:os.x ",
    "? ",
    "<<: ",
    "#",
    "\0",
]
PIECES += [
    "1e-3",
    "~",
    ".nan",
    "0x",
    "---\n",
    "|\n",
    ">",
    "%",
    "@",
    "\n",
    "\ufeff",
    "2024-99-99",
    "9" * 5000,
    "é",
    "[" * 600,
    "<<: *a\n",
    "!!set {a}",
    "!!omap [a: 1]",
]


@settings(many, max_examples=examples(1500))
@given(
    cuts=st.lists(st.tuples(st.integers(0, len(TEXT)), st.integers(0, 12), st.sampled_from(["", *PIECES])), min_size=1, max_size=3),
    world_size=worlds,
)
def test_damaged_text(tmp_path_factory: pytest.TempPathFactory, cuts: list[tuple[int, int, str]], world_size: int) -> None:
    text = TEXT
    for at, length, piece in cuts:
        text = text[:at] + piece + text[at + length :]
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes(text.encode())
    outcome(lambda: load_config(path), world_size)


DOTTED = [
    *(key for key, _ in keys()),
    "model.rope_scaling.factor",
    "zero.deepspeed.aio",
    "zero.deepspeed.zero_optimization.stage",
    "train",
    "x.y",
    "run.dir.x",
    ".",
    "",
]
VALUES = [
    "",
    "1",
    "0",
    "-1",
    "1e-3",
    "true",
    "null",
    "auto",
    "cpu",
    "nvme",
    "gpt2-124m",
    "[1, 2]",
    "{a: 1}",
    "[",
    "*x",
    "!!int ''",
    "2**3",
    "'",
    "=",
    "x=y",
]


@settings(many, max_examples=examples(1500))
@given(
    picked=st.lists(
        st.tuples(st.sampled_from(DOTTED), st.sampled_from(["=", "=", "=", ""]), st.sampled_from(VALUES)), min_size=1, max_size=4
    ),
    world_size=worlds,
)
def test_damaged_overrides(tmp_path_factory: pytest.TempPathFactory, picked: list[tuple[str, str, str]], world_size: int) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "sound.yaml"
    if not path.exists():
        path.write_text(yaml.safe_dump({key: BASE[key] for key in ("model", "train", "parallel")}))
    outcome(lambda: load_config(path, [key + equals + value for key, equals, value in picked]), world_size)


@settings(many, max_examples=300)
@given(data=st.binary(max_size=60))
def test_any_bytes_as_deepspeed_json(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    outcome(lambda: parse_config({"model": BASE["model"], "zero": {"config": str(path)}}), 1)
