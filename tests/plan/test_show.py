"""What `toolkit estimate` shows, and what it needs to be imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from toolkit.config.load import parse_config
from toolkit.config.schema import RunConfig
from toolkit.errors import ConfigError, LayoutError
from toolkit.hardware.catalogue import parse_hardware, with_host_gib
from toolkit.plan.show import estimate_json, estimate_text


def _config(**parallel: int) -> RunConfig:
    return parse_config(
        {
            "model": {"preset": "llama3-8b"},
            "parallel": parallel,
            "train": {"global_batch_size": 64, "seq_length": 8192},
            "zero": {"stage": 1},
        }
    )


def test_json_holds_every_part_and_they_sum() -> None:
    answer = estimate_json(_config(tp=2, pp=2), parse_hardware("h100-80gb:8x4"))
    assert answer["gpus"] == 32 and answer["layout"]["dp"] == 8 and answer["fits"] is True
    assert sum(answer["time_parts_s"].values()) == pytest.approx(answer["step_s"])
    for stage in answer["stages"]:
        total = sum(stage["parts_gib"].values()) + stage["fragmentation_gib"] + stage["context_gib"]
        assert total == pytest.approx(stage["device_gib"], abs=0.01)
    assert answer["peak_device_gib"] == max(s["device_gib"] for s in answer["stages"])
    assert json.loads(json.dumps(answer)) == answer


def test_text_names_the_worst_rank_and_the_verdict() -> None:
    text = estimate_text(_config(tp=2, pp=2), parse_hardware("h100-80gb:8x4"))
    assert "fits: stage 0 (from rank 0)" in text and "tokens/s per GPU" in text and "pipeline bubble" in text
    assert "8.03 B parameters" in text and "GiB" in text
    assert "does not fit" in estimate_text(_config(), parse_hardware("rtx4090-24gb:8x4"))


def test_what_does_not_fit_is_told_what_to_set() -> None:
    text = estimate_text(_config(), parse_hardware("h100-80gb:8x4"), width=300)
    assert "GiB too much" in text and "Set train.recompute=full: the estimate is then" in text
    assert "toolkit tune" in estimate_json(_config(), parse_hardware("h100-80gb:8x4"))["remedy"]


def test_a_node_whose_ram_is_too_small_does_not_fit() -> None:
    config = parse_config(
        {
            "model": {"preset": "llama3-70b"},
            "train": {"global_batch_size": 8, "recompute": "full"},
            "zero": {"stage": 3, "offload_optimizer": "cpu"},
        }
    )
    node = parse_hardware("h100-80gb:8")
    assert estimate_json(config, node)["fits"] and not estimate_json(config, with_host_gib(node, 512))["fits"]
    text = estimate_text(config, with_host_gib(node, 512), width=300)
    assert "does not fit" in text and "461 GiB of RAM to spare" in text and "Offloading to nvme (zero.nvme_path)" in text
    with pytest.raises(ConfigError, match="--host-gib"):
        with_host_gib(node, 0)


def test_context_parallelism_says_by_which_exchange() -> None:
    hardware = parse_hardware("h100-80gb:8x4")
    answer = estimate_json(_config(cp=2), hardware)
    assert answer["remark"].startswith("context parallel by allgather: 8 key/value heads") and answer["step_s"] > 0
    assert "note: context parallel by allgather" in estimate_text(_config(cp=2), hardware)
    assert estimate_json(_config(cp=8), hardware)["remark"].startswith("context parallel by ulysses")
    assert estimate_json(_config(), hardware)["remark"] == ""


def test_small_models_are_shown_in_small_units() -> None:
    model = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256}
    text = estimate_text(parse_config({"model": model, "train": {"precision": "fp32", "seq_length": 32}}), parse_hardware("cpu:2"))
    assert "one rank, MiB" in text and "fits: stage 0" in text


@pytest.mark.parametrize(
    ("parallel", "spec", "error", "words"),
    [
        ({"tp": 3}, "h100:8x4", LayoutError, "32 processes are no multiple of parallel.tp=3"),
        ({"tp": 32}, "h100:8x4", LayoutError, "parallel.tp=32 does not divide model.num_query_groups=8"),
        ({"vpp": 2}, "h100:8x4", LayoutError, "parallel.vpp=2 with parallel.pp=1"),
        ({}, "h100:8x16", LayoutError, "train.global_batch_size=64 is no multiple"),
        ({}, "h1000:8x4", ConfigError, "Did you mean"),
    ],
)
def test_what_cannot_run_is_refused(parallel: dict[str, int], spec: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        estimate_text(_config(**parallel), parse_hardware(spec))


def test_estimating_imports_no_training_library() -> None:
    program = (
        "import sys\n"
        "from toolkit.config.load import parse_config\n"
        "from toolkit.hardware.catalogue import parse_hardware\n"
        "from toolkit.plan.show import estimate_text\n"
        "import toolkit.evidence.published, toolkit.evidence.fit, toolkit.evidence.measures, toolkit.evidence.software\n"
        "config = parse_config({'model': {'preset': 'llama3-8b'}, 'train': {'global_batch_size': 64}})\n"
        "estimate_text(config, parse_hardware('h100:8x4'))\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'deepspeed', 'megatron', 'transformers', 'numpy'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
