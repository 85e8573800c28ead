"""What `toolkit estimate` shows, and what it needs to be imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from toolkit.config.load import parse_config
from toolkit.config.schema import RunConfig
from toolkit.errors import ConfigError, LayoutError
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
    answer = estimate_json(_config(tp=2, pp=2), "h100-80gb:8x4")
    assert answer["gpus"] == 32 and answer["layout"]["dp"] == 8 and answer["fits"] is True
    assert sum(answer["time_parts_s"].values()) == pytest.approx(answer["step_s"])
    for stage in answer["stages"]:
        total = sum(stage["parts_gib"].values()) + stage["fragmentation_gib"] + stage["context_gib"]
        assert total == pytest.approx(stage["device_gib"], abs=0.01)
    assert answer["peak_device_gib"] == max(s["device_gib"] for s in answer["stages"])
    assert json.loads(json.dumps(answer)) == answer


def test_text_names_the_worst_rank_and_the_verdict() -> None:
    text = estimate_text(_config(tp=2, pp=2), "h100-80gb:8x4")
    assert "fits: stage 0 (from rank 0)" in text and "tokens/s per GPU" in text and "pipeline bubble" in text
    assert "8.03 B parameters" in text and "GiB" in text
    assert "does not fit" in estimate_text(_config(), "rtx4090-24gb:8x4")


def test_small_models_are_shown_in_small_units() -> None:
    model = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256}
    text = estimate_text(parse_config({"model": model, "train": {"precision": "fp32", "seq_length": 32}}), "cpu:2")
    assert "one rank, MiB" in text and "fits: stage 0" in text


@pytest.mark.parametrize(
    ("parallel", "spec", "error", "words"),
    [
        ({"tp": 3}, "h100:8x4", LayoutError, "does not divide"),
        ({}, "h100:8x16", LayoutError, "train.global_batch_size=64 is not a multiple"),
        ({}, "h1000:8x4", ConfigError, "Did you mean"),
    ],
)
def test_what_cannot_run_is_refused(parallel: dict[str, int], spec: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        estimate_text(_config(**parallel), spec)


def test_estimating_imports_no_training_library() -> None:
    program = (
        "import sys\n"
        "from toolkit.config.load import parse_config\n"
        "from toolkit.plan.show import estimate_text\n"
        "import toolkit.plan.published, toolkit.plan.fit, toolkit.plan.score\n"
        "config = parse_config({'model': {'preset': 'llama3-8b'}, 'train': {'global_batch_size': 64}})\n"
        "estimate_text(config, 'h100:8x4')\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'deepspeed', 'megatron', 'transformers', 'numpy'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
