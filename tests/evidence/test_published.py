"""The reader of published rows: answers or says why not, whatever is null."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.cost.network import port
from toolkit.errors import ConfigError
from toolkit.evidence.published import predict, predict_file, read_row

ROW: dict[str, Any] = {
    "id": "made-up",
    "source_id": "none",
    "framework": "Megatron-LM",
    "model": {
        "name": "Llama",
        "family": "llama",
        "layers": 32,
        "hidden": 4096,
        "heads": 32,
        "kv_heads": 8,
        "ffn_hidden": 14336,
        "gated_mlp": True,
        "vocab": 128256,
        "seq_len": 8192,
        "tied_embeddings": False,
    },
    "hardware": {
        "gpu": "H100-SXM5-80GB",
        "count": 64,
        "gpus_per_node": 8,
        "interconnect": "NVLink/NVSwitch + 8x NDR InfiniBand 400 Gb/s per node",
        "gpu_mem_gb": 80,
        "peak_bf16_tflops": 989,
    },
    "parallel": {"tp": 2, "pp": 2, "dp": 16, "cp": 1, "vpp": 1, "zero_stage": 1, "offload": "none", "sequence_parallel": True},
    "batch": {"global": 256, "micro": 1},
    "recompute": "none",
    "recompute_detail": None,
    "attention": "flash",
    "attention_as_printed": "TE fused attention",
    "precision": "bf16",
    "flags": [],
    "measured": {"tokens_per_s_per_gpu": None, "peak_memory_gib": None, "memory_kind": None, "fits": None},
}
FIELDS = [(key,) for key in ROW if key != "id"] + [(key, inner) for key, body in ROW.items() if isinstance(body, dict) for inner in body]
ODD = st.one_of(
    st.none(),
    st.integers(-5, 10),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.booleans(),
    st.lists(st.none(), max_size=2),
    st.just({}),
)


def _with(changes: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    row = copy.deepcopy(ROW)
    for path, value in changes.items():
        holder = row
        for name in path[:-1]:
            holder = holder[name] if isinstance(holder.get(name), dict) else {}
        holder[path[-1]] = value
    return row


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_any_field_may_be_null(path: tuple[str, ...]) -> None:
    answer = predict(_with({path: None}))
    assert answer["id"] == "made-up"
    assert answer.get("unsupported") or answer["tokens_per_s_per_gpu"] > 0


@settings(max_examples=400, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=6))
def test_no_row_makes_it_fail(changes: dict[tuple[str, ...], Any]) -> None:
    answer = predict(_with(changes))
    assert answer.get("unsupported") or (answer["peak_reserved_gib"] >= answer["peak_allocated_gib"] > 0)


def test_a_whole_row_becomes_the_workload_it_describes() -> None:
    workload, hardware = read_row(ROW)
    assert (workload.tp, workload.pp, workload.dp, workload.microbatches) == (2, 2, 16, 16)
    assert workload.model.parameters == pytest.approx(8.03e9, rel=1e-3)
    assert (hardware.gpu.name, hardware.nodes, hardware.nic_gb_s) == ("h100-80gb", 8, 50.0)
    assert workload.stack.name == "megatron" and workload.kernel == "cudnn"


@pytest.mark.parametrize(
    ("printed", "gb_s"),
    [
        ("NVLink + 8x100 Gb/s EDR", 12.5),
        ("RoCE 1600 Gb/s per node", 25.0),
        ("NVLink; RDMA 400 Gb/s per GPU", 50.0),
        ("8x HDR InfiniBand 200 Gb/s per node", 25.0),
        ("NVLink single node", 50.0),
    ],
)
def test_printed_networks_are_read(printed: str, gb_s: float) -> None:
    assert read_row(_with({("hardware", "interconnect"): printed}))[1].nic_gb_s == gb_s


@pytest.mark.parametrize(
    ("name", "memory", "found"),
    [
        ("A100-SXM4-40GB", 40, "a100-40gb"),
        ("A100", 40, "a100-40gb"),
        ("A100", None, "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", 80, "h100-80gb"),
        ("V100-SXM2", 16, "v100-16gb"),
        ("B200", 192, "b200-180gb"),
    ],
)
def test_printed_gpus_are_found(name: str, memory: int | None, found: str) -> None:
    assert read_row(_with({("hardware", "gpu"): name, ("hardware", "gpu_mem_gb"): memory}))[1].gpu.name == found


@pytest.mark.parametrize(
    ("framework", "attention", "stage"),
    [
        ("torchtitan", "flash", 3),
        ("DeepSpeed ZeRO-3", "flash", 3),
        ("DeepSpeed", "flash", 1),  # its pipelines refuse stages above
        ("NeMo", "flash", 1),
        ("Megatron-LM", "unfused", 0),
    ],
)
def test_an_unprinted_zero_stage_is_the_frameworks(framework: str, attention: str, stage: int) -> None:
    row = _with({("framework",): framework, ("attention",): attention, ("attention_as_printed",): None, ("parallel", "zero_stage"): None})
    assert read_row(row)[0].zero == stage


def test_what_was_measured_is_not_looked_at() -> None:
    """A prediction is the same whatever the row says was measured, and of which counter."""
    seen = {"tokens_per_s_per_gpu": 1.0, "peak_memory_gib": 1.0, "memory_kind": "allocated, LAST rank only", "fits": False}
    assert predict(ROW) == predict({**ROW, "measured": seen}) == predict({k: v for k, v in ROW.items() if k != "measured"})


def test_a_port_without_a_number_has_its_makers() -> None:
    assert read_row(_with({("hardware", "interconnect"): "NVLink; 4x Omni-Path per node"}))[1].nic_gb_s == 6.25
    assert read_row(_with({("hardware", "interconnect"): "NVLink; HDR InfiniBand"}))[1].nic_gb_s == 3.125


@pytest.mark.parametrize(
    ("framework", "printed", "switches"),
    [
        ("somebody's trainer", "flash2", {"norm_fused": False, "gate_fused": False, "whole_logits": True, "gradients": "fp32"}),
        ("somebody's trainer", "flash2 + RMS kernel", {"norm_fused": True, "gate_fused": False}),
        ("Megatron-LM", "TE fused attention", {"norm_fused": True, "gemm_accumulates": True, "placeholders": True}),
        ("Megatron-DeepSpeed 2022", "no flash", {"gradients": "fp32", "gemm_accumulates": False, "old_driver": True}),
        ("DeepSpeed + HF, torch.compile", "torch", {"softmax_fused": False}),
    ],
)
def test_software_is_read_from_what_a_row_says(framework: str, printed: str, switches: dict[str, Any]) -> None:
    attention = "unfused" if printed == "no flash" else "flash"
    row = _with({("framework",): framework, ("attention_as_printed",): printed, ("attention",): attention})
    stack = read_row(row)[0].stack
    assert {name: getattr(stack, name) for name in switches} == switches


def test_the_year_decides_what_no_row_says() -> None:
    old, new = (read_row(_with({("framework",): f"Megatron-LM {year}"}))[0].stack for year in (2021, 2024))
    assert (old.loss, old.old_driver, new.loss, new.old_driver) == ("cloned", True, "parallel", False)
    assert read_row({**ROW, "url": "https://arxiv.org/abs/2104.04473"})[0].stack == old


def test_interleaving_that_is_not_printed_is_what_a_user_would_take() -> None:
    unprinted = {("parallel", "vpp"): None, ("parallel", "pp"): 8, ("parallel", "dp"): 4}
    few, many = (read_row(_with(unprinted | {("batch", "global"): batch}))[0] for batch in (64, 4096))
    assert (few.vpp, many.vpp) == (4, 1), "16 micro-batches in 8 stages are half a bubble, 1024 are hardly any"
    assert read_row(_with(unprinted | {("framework",): "DeepSpeed pipelines"}))[0].vpp == 1
    printed, guessed = (predict(_with({**unprinted, ("parallel", "vpp"): vpp, ("batch", "global"): 64})) for vpp in (4, None))
    assert guessed["tokens_per_s_per_gpu"] == printed["tokens_per_s_per_gpu"]
    wide, narrow = (answer["range"]["tokens_per_s_per_gpu"] for answer in (guessed, printed))
    assert wide[1] - wide[0] > narrow[1] - narrow[0]


def test_norms_that_are_not_fused_cost_memory_and_time() -> None:
    fused, chains = (
        predict(_with({("framework",): "somebody's trainer", ("attention_as_printed",): text}))
        for text in ("flash2 + RMS kernel", "flash2")
    )
    assert chains["peak_allocated_gib"] > 1.04 * fused["peak_allocated_gib"]
    assert chains["tokens_per_s_per_gpu"] < 0.95 * fused["tokens_per_s_per_gpu"]


def test_launches_that_block_cost_each_kernel_a_wait() -> None:
    """The page with BigScience's runs says that those on 320 GPUs or more ran so; the wait is per launch, whatever its size."""
    page = "https://github.com/bigscience-workshop/bigscience/blob/master/train/tr11-176B-ml/chronicles-prequel.md"
    runs = {("framework",): "Megatron-DeepSpeed", ("attention",): "unfused", ("attention_as_printed",): "no flash"}
    runs |= {("parallel", "tp"): 8, ("parallel", "pp"): 4}

    def lost(gpus: int, micro: int) -> float:
        sized = {("hardware", "count"): gpus, ("parallel", "dp"): gpus // 32, ("batch", "global"): 32 * gpus, ("batch", "micro"): micro}
        rates = [predict(_with(runs | sized | {("url",): url}))["tokens_per_s_per_gpu"] for url in ("", page)]
        return float(1 - rates[1] / rates[0])

    assert lost(160, 1) == 0
    assert lost(320, 1) > 1.5 * lost(320, 4) > 0


def test_a_network_gives_what_was_measured_of_it() -> None:
    """NCCL reached 40.5 of a port's 100 Gb/s over Omni-Path (bigscience, all_reduce_bench-a100-n4.txt)."""
    rates = [
        port(read_row(_with({("hardware", "interconnect"): f"NVLink; {ports}"}))[1]) * 8 * 8 / 4
        for ports in ("4x Omni-Path per node", "4x HDR InfiniBand 100 Gb/s per node")
    ]
    assert rates == pytest.approx([40.5, 90.0])


def test_what_cannot_be_answered_is_said() -> None:
    assert "hardware.gpu" in predict(_with({("hardware", "gpu"): None}))["unsupported"]
    assert "Did you mean" in predict(_with({("hardware", "gpu"): "H10O"}))["unsupported"]
    assert "int4" in predict(_with({("precision",): "int4"}))["unsupported"]


def test_a_file_of_rows_becomes_a_file_of_answers(tmp_path: Path) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    source.write_text("\n".join(json.dumps(r) for r in (ROW, _with({("hardware", "gpu"): None}), [])) + "\n")
    summary = predict_file(source, out)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert (summary.rows, summary.answered) == (3, 1) and len(answers) == 3
    assert answers[0]["fits"] is True and sum(summary.unsupported.values()) == 2


def test_a_damaged_file_is_named_with_its_line(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(ROW) + "\n{oops\n")
    with pytest.raises(ConfigError, match="line 2"):
        predict_file(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="cannot be read"):
        predict_file(tmp_path / "absent", tmp_path / "out")
