"""Every rule can be broken, says so clearly, and its suggestion mends it; legal configs get the
right layout.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from toolkit.config.load import dump_config, load_config, parse_config
from toolkit.config.schema import RunConfig
from toolkit.errors import LayoutError
from toolkit.parallel.case import Case, Machine
from toolkit.parallel.layout import Layout, split_layers
from toolkit.parallel.rules import RULES, check, legal, rules_markdown, violations

ROOT = Path(__file__).parents[2]
GPU = Machine(cuda=True, transformer_engine=True)
TINY: dict[str, Any] = {
    "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 128},
    "train": {"global_batch_size": 8, "micro_batch_size": 2, "seq_length": 32},
}


def config_of(changes: dict[str, Any]) -> RunConfig:
    raw: dict[str, Any] = {section: dict(body) for section, body in TINY.items()}
    for dotted, value in changes.items():
        *parents, name = dotted.split(".")
        at = raw
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = value
    return parse_config(raw)


def applied(config: RunConfig, suggest: dict[str, Any], folder: Path) -> RunConfig:
    """What a user would do: the resolved YAML, with the suggestion as overrides."""
    (folder / "run.yaml").write_text(dump_config(config))
    words = {None: "null", True: "true", False: "false"}
    values = {k: list(v) if isinstance(v, tuple) else words[v] if v is None or isinstance(v, bool) else v for k, v in suggest.items()}
    return load_config(folder / "run.yaml", [f"{key}={value}" for key, value in values.items()])


HPZ = {"zero.deepspeed.zero_optimization.zero_hpz_partition_size": 2}
QGZ = {"zero.deepspeed.zero_optimization.zero_quantized_gradients": True}
# rule: (settings, processes, machine, what the message must hold); several for one rule where its
# suggestion differs
BROKEN: list[tuple[str, dict[str, Any], int, Machine, list[str]]] = [
    ("world-size", {"parallel.tp": 2, "parallel.pp": 2}, 6, GPU, ["6 processes", "parallel.tp=2", "parallel.pp=2"]),
    ("world-size", {"parallel.tp": 2, "parallel.pp": 4, "parallel.vpp": 1}, 3, GPU, ["3 processes"]),
    ("tp-heads", {"parallel.tp": 3}, 3, GPU, ["parallel.tp=3", "model.num_attention_heads=4"]),
    ("tp-groups", {"parallel.tp": 4}, 4, GPU, ["parallel.tp=4", "model.num_query_groups=2", "parallel.tp=2"]),
    ("tp-ffn", {"parallel.tp": 2, "model.ffn_hidden_size": 127}, 2, GPU, ["model.ffn_hidden_size=127"]),
    ("tp-vocab", {"parallel.tp": 2, "model.vocab_multiple": 3}, 2, GPU, ["model.vocab_multiple=3"]),
    ("tp-vocab", {"parallel.tp": 2, "model.vocab_multiple": 1, "model.vocab_size": 257}, 2, GPU, ["padded vocabulary of 257"]),
    ("heads-groups", {"model.num_query_groups": 3}, 1, GPU, ["model.num_query_groups=3", "model.num_attention_heads=4"]),
    ("sp-tp", {"parallel.sequence_parallel": True}, 2, GPU, ["sequence_parallel=true", "parallel.tp=2"]),
    ("sp-sequence", {"parallel.tp": 2, "parallel.sequence_parallel": True, "train.seq_length": 31}, 2, GPU, ["train.seq_length=31"]),
    ("pp-layers", {"parallel.pp": 5}, 5, GPU, ["model.num_layers=4", "parallel.pp=5"]),
    ("pp-layers", {"parallel.pp": 2, "parallel.vpp": 3}, 2, GPU, ["parallel.vpp=3", "parallel.vpp=2"]),
    ("vpp-pp", {"parallel.vpp": 2}, 2, GPU, ["parallel.vpp=2", "parallel.pp=1"]),
    ("batch", {"train.global_batch_size": 7}, 1, GPU, ["train.global_batch_size=7", "=8 or 6"]),
    ("batch", {"parallel.pp": 2, "parallel.vpp": 2, "train.global_batch_size": 9}, 2, GPU, ["train.global_batch_size=9"]),
    (
        "accumulation",
        {"zero.deepspeed.gradient_accumulation_steps": 2},
        1,
        GPU,
        ["gradient_accumulation_steps=2", "train.micro_batch_size=4"],
    ),
    (
        "accumulation",
        {"zero.deepspeed.gradient_accumulation_steps": 5},
        1,
        GPU,
        ["gradient_accumulation_steps=5", "train.global_batch_size=10"],
    ),
    ("vpp-microbatches", {"parallel.pp": 2, "parallel.vpp": 2, "train.global_batch_size": 6}, 2, GPU, ["3 micro-batches", "parallel.pp=2"]),
    ("positions", {"model.max_position_embeddings": 16}, 1, GPU, ["train.seq_length=32", "max_position_embeddings=16"]),
    ("cp-sequence", {"parallel.cp": 3}, 3, GPU, ["train.seq_length=32 is no multiple of 2 x parallel.cp=3", "train.seq_length=30"]),
    (
        "cp-heads",
        {"parallel.cp": 3, "parallel.cp_exchange": "ulysses", "train.seq_length": 30},
        3,
        GPU,
        ["parallel.cp=3", "num_attention_heads", "parallel.cp_exchange=allgather"],
    ),
    ("ring-dropout", {"parallel.cp": 2, "parallel.cp_exchange": "ring", "model.dropout": 0.1}, 2, GPU, ["dropout", "allgather"]),
    (
        "ring-precision",
        {"parallel.cp": 2, "parallel.cp_exchange": "ring", "train.precision": "fp32"},
        2,
        GPU,
        ["train.precision=fp32", "parallel.cp_exchange=allgather"],
    ),
    ("offload-activations", {"train.offload_activations": True}, 1, GPU, ["train.recompute=none", "train.recompute=full"]),
    ("document-mask", {"data.document_mask": True, "model.impl": "te"}, 1, GPU, ["model.impl=te", "model.impl=local"]),
    ("document-mask", {"data.document_mask": True, "model.compile": True}, 1, GPU, ["model.compile=true", "model.compile=false"]),
    ("compile-layers", {"parallel.tp": 2, "model.compile": True}, 2, GPU, ["model.compile=true", "parallel.tp=2"]),
    ("compile-layers", {"train.recompute": "full", "model.compile": True}, 1, GPU, ["train.recompute=full"]),
    ("te-machine", {"model.impl": "te"}, 1, Machine(), ["without CUDA", "model.impl=local"]),
    ("te-machine", {"model.impl": "te", "parallel.cp": 2}, 2, Machine(cuda=True), ["without Transformer Engine", "parallel.cp=1"]),
    ("rope-head", {"model.head_dim": 15}, 1, GPU, ["model.head_dim=15", "16"]),
    ("rope-scaling", {"model.family": "gpt", "model.rope_scaling": {"factor": 2}}, 1, GPU, ["model.family=gpt"]),
    ("compile-stage", {"model.compile": True, "zero.stage": 2}, 1, GPU, ["zero.stage=2"]),
    ("offload-optimizer-stage", {"zero.offload_optimizer": "cpu", "zero.stage": 0}, 1, GPU, ["zero.offload_optimizer=cpu", "zero.stage=1"]),
    (
        "optimizer-offload",
        {"optimizer.name": "sgd", "zero.offload_optimizer": "cpu"},
        1,
        GPU,
        ["zero.offload_optimizer=cpu with optimizer.name=sgd", "zero.offload_optimizer=none or optimizer.name=adamw"],
    ),
    ("muon-stage", {"optimizer.name": "muon", "zero.stage": 2}, 2, GPU, ["optimizer.name=muon with zero.stage=2", "Set zero.stage=1"]),
    (
        "muon-stage",
        {"optimizer.name": "muon", "zero.stage": 3, "zero.offload_param": "cpu"},
        2,
        GPU,
        ["zero.stage=1 and zero.offload_param=none"],
    ),
    ("offload-param-stage", {"zero.offload_param": "cpu", "zero.stage": 2}, 1, GPU, ["zero.offload_param=cpu", "zero.stage=3"]),
    ("nvme-optimizer-stage", {"zero.offload_optimizer": "nvme", "zero.nvme_path": "/d", "zero.stage": 2}, 1, GPU, ["zero.stage=3"]),
    (
        "nvme-optimizer-stage",
        {"zero.offload_optimizer": "nvme", "zero.nvme_path": "/d", "zero.stage": 0},
        1,
        GPU,
        ["Set zero.stage=3, or zero.stage=1 and zero.offload_optimizer=cpu."],
    ),
    (
        "nvme-path",
        {"zero.offload_optimizer": "nvme", "zero.stage": 0},
        1,
        GPU,
        ["or set zero.stage=1 and zero.offload_optimizer=cpu, or zero.offload_optimizer=none."],
    ),
    (
        "nvme-buffer",
        {
            "zero.offload_param": "nvme",
            "zero.nvme_path": "/d",
            "zero.stage": 3,
            "zero.deepspeed.zero_optimization.offload_param.buffer_size": 5e3,
        },
        1,
        GPU,
        ["buffer_size=5000", "16384 elements", "buffer_size=auto"],
    ),
    (
        "nvme-path",
        {"zero.offload_optimizer": "nvme", "zero.offload_param": "nvme", "zero.stage": 3},
        1,
        GPU,
        ["Set zero.nvme_path to a folder"],
    ),
    (
        "partial-offload",
        {"zero.offload_optimizer": "cpu", "zero.deepspeed.zero_optimization.offload_optimizer.ratio": 0.5},
        1,
        GPU,
        ["zero.stage=3"],
    ),
    ("zeropp-stage", {**HPZ, "zero.stage": 2}, 2, GPU, ["ZeRO++", "zero.stage=3"]),
    ("hpz-neighbours", {**HPZ, "zero.stage": 3, "parallel.tp": 2}, 4, GPU, ["zero_hpz_partition_size=2", "parallel.tp=1"]),
    ("hpz-dp", {**HPZ, "zero.stage": 3, "train.global_batch_size": 6}, 3, GPU, ["zero_hpz_partition_size=2", "3 data-parallel", "auto"]),
    ("qgz-ranks", {**QGZ, "zero.stage": 3, "parallel.pp": 2}, 2, GPU, ["parallel.pp=2", "zero_quantized_gradients=false"]),
    ("quantized-cuda", {**QGZ, "zero.stage": 3}, 1, Machine(), ["without CUDA"]),
    ("sliding-window", {"model.sliding_window": 16}, 1, GPU, ["train.seq_length=32", "sliding_window=16"]),
    ("warm-up", {"optimizer.warmup_steps": 30, "train.steps": 20}, 1, GPU, ["warmup_steps=30", "train.steps=20"]),
    ("decay", {"optimizer.warmup_steps": 10, "optimizer.decay_steps": 5}, 1, GPU, ["decay_steps=5", "warmup_steps=10"]),
    ("decay", {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 10, "optimizer.decay_steps": 15}, 1, GPU, ["wsd", "decay_steps=10"]),
    ("decay", {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 20}, 1, GPU, ["decay_steps=null", "warmup_steps=18"]),
    ("eval-steps", {"train.eval_every": 5}, 1, GPU, ["train.eval_every=5", "train.eval_steps=1"]),
    ("eval-split", {"train.eval_every": 5, "train.eval_steps": 1, "data.split": [1, 0, 0]}, 1, GPU, ["data.split"]),
]


def test_each_rule_has_a_broken_example() -> None:
    assert {rule.id for rule in RULES} == {row[0] for row in BROKEN}
    assert len({rule.id for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("row", BROKEN, ids=lambda row: row[0])
def test_a_broken_rule_is_named_and_its_suggestion_is_legal(
    row: tuple[str, dict[str, Any], int, Machine, list[str]], tmp_path: Path
) -> None:
    rule, changes, world_size, machine, says = row
    config = config_of(changes)
    found = {v.rule: v for v in violations(config, world_size, machine=machine)}
    assert rule in found
    assert all(part in str(found[rule]) for part in says), str(found[rule])
    with pytest.raises(LayoutError) as caught:
        check(config, world_size, machine=machine)
    assert found[rule].what in str(caught.value)
    mended = applied(config, found[rule].suggest, tmp_path)
    left = {v.rule for v in violations(mended, world_size, machine=machine)}
    assert found[rule].suggest and rule not in left and left <= found.keys()
    if len(found) == 1:
        assert check(mended, world_size, machine=machine).world_size == world_size


@pytest.mark.parametrize(
    ("changes", "world_size", "layout"),
    [
        ({}, 1, Layout(micro_batch_size=2, num_microbatches=4)),
        (
            {"parallel.tp": 2, "parallel.sequence_parallel": True},
            2,
            Layout(tp=2, sequence_parallel=True, micro_batch_size=2, num_microbatches=4),
        ),
        ({"parallel.pp": 2, "parallel.vpp": 2, "zero.stage": 3}, 4, Layout(pp=2, vpp=2, dp=2, micro_batch_size=2, num_microbatches=2)),
        ({"parallel.pp": 4, "zero.stage": 2}, 4, Layout(pp=4, micro_batch_size=2, num_microbatches=4)),
        ({"train.precision": "fp16", "train.on_nonfinite": "skip"}, 4, Layout(dp=4, micro_batch_size=2, num_microbatches=1)),
        ({"zero.stage": 3, "zero.offload_param": "nvme", "zero.nvme_path": "/d"}, 1, Layout(micro_batch_size=2, num_microbatches=4)),
        ({"parallel.tp": 2, "model.dropout": 0.1, "model.qk_layernorm": True}, 2, Layout(tp=2, micro_batch_size=2, num_microbatches=4)),
        ({"optimizer.warmup_steps": 20, "train.steps": 20}, 1, Layout(micro_batch_size=2, num_microbatches=4)),
    ],
)
def test_legal_configs(changes: dict[str, Any], world_size: int, layout: Layout) -> None:
    config = config_of(changes)
    assert violations(config, world_size, machine=GPU) == []
    assert check(config, world_size, machine=GPU) == layout
    assert legal(Case.of(config, world_size, machine=GPU))


def test_no_process_is_refused() -> None:
    with pytest.raises(LayoutError, match="0 processes"):
        check(config_of({}), 0)


def test_rules_page_is_up_to_date() -> None:
    assert (ROOT / "docs/rules.md").read_text() == rules_markdown(), "run: python -m toolkit.parallel.rules > docs/rules.md"


SIZES = [*range(1, 13), 16, 24, 32, 48, 64, 96, 128, 1000, 2**31 - 1]
SWITCH = [False, True]
POOL: dict[str, list[Any]] = {
    **dict.fromkeys(
        [f"model.{key}" for key in ("num_layers", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "head_dim")], SIZES
    ),
    **dict.fromkeys([f"model.{key}" for key in ("vocab_multiple", "vocab_size", "max_position_embeddings")], SIZES),
    **dict.fromkeys([f"parallel.{key}" for key in ("tp", "pp", "vpp", "cp")], SIZES),
    **dict.fromkeys([f"train.{key}" for key in ("global_batch_size", "micro_batch_size", "seq_length", "steps")], SIZES),
    **dict.fromkeys(["optimizer.decay_steps", "zero.deepspeed.gradient_accumulation_steps"], SIZES),
    "zero.deepspeed.zero_optimization.zero_hpz_partition_size": [0, 1, 2, 3, 4, 8, "auto"],
    "zero.deepspeed.zero_optimization.zero_quantized_weights": SWITCH,
    "zero.deepspeed.zero_optimization.zero_quantized_gradients": SWITCH,
    "model.family": ["gpt", "llama"],
    "model.impl": ["local", "te"],
    "model.compile": SWITCH,
    "model.rope_scaling": [None, {"factor": 4}],
    "parallel.sequence_parallel": SWITCH,
    "zero.stage": [0, 1, 2, 3],
    "zero.offload_optimizer": ["none", "cpu", "nvme"],
    "zero.offload_param": ["none", "cpu", "nvme"],
    "zero.nvme_path": [None, "/d"],
    "optimizer.schedule": ["constant", "linear", "cosine", "wsd"],
    "optimizer.warmup_steps": [0, 1, 2, 10, 20, 40],
    "train.eval_every": [0, 1],
    "train.eval_steps": [0, 1],
    "data.split": [(98, 1, 1), (1, 0, 0)],
}
WORLDS = [*range(1, 17), 64, 720, 4096, 16384]
picks = st.lists(st.tuples(st.sampled_from(sorted(POOL)), st.integers(0, 10_000)), max_size=8)
worlds = st.sampled_from(WORLDS)
machines = st.sampled_from([Machine(), GPU, Machine(cuda=True)])
BROKEN_BY_ID: dict[str, Callable[[Case], bool]] = {rule.id: rule.broken for rule in RULES}


def mutated(picked: list[tuple[str, int]]) -> RunConfig:
    return config_of({"model.head_dim": 16, **{key: POOL[key][index % len(POOL[key])] for key, index in picked}})


@settings(max_examples=examples(3000), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(picks, worlds, machines)
@example([("parallel.tp", 20), ("model.num_attention_heads", 20)], 4096, GPU)
@example([("parallel.cp", 1), ("parallel.pp", 1), ("train.global_batch_size", 4388)], 1, Machine())  # as large as a batch may be
def test_a_legal_layout_or_suggestions_that_mend(picked: list[tuple[str, int]], world_size: int, machine: Machine) -> None:
    config = mutated(picked)
    found = violations(config, world_size, machine=machine)
    case = Case.of(config, world_size, machine=machine)
    assert legal(case) == (not found)
    if not found:
        layout = check(config, world_size, machine=machine)
        assert layout.world_size == world_size
        assert layout.num_microbatches * layout.micro_batch_size * layout.dp == config.train.global_batch_size
        assert split_layers(config.model.num_layers, layout.pp * layout.vpp)
    for violation in found:
        assert violation.what and violation.why and violation.fix.endswith(".")
        assert violation.suggest, violation
        assert not BROKEN_BY_ID[violation.rule](case.changed(violation.suggest)), violation


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(picked=picks, world_size=worlds)
def test_suggestions_work_as_overrides(tmp_path_factory: pytest.TempPathFactory, picked: list[tuple[str, int]], world_size: int) -> None:
    config = mutated(picked)
    for violation in violations(config, world_size, machine=GPU):
        mended = applied(config, violation.suggest, tmp_path_factory.getbasetemp())
        assert violation.rule not in {v.rule for v in violations(mended, world_size, machine=GPU)}
