"""The advice where memory ends: legal, near, and sized by the estimate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from toolkit.config.load import load_config, parse_config
from toolkit.cost.memory import GIB, estimate
from toolkit.cost.workload import Workload
from toolkit.hardware.catalogue import parse_hardware
from toolkit.parallel.case import Machine
from toolkit.parallel.rules import violations
from toolkit.plan.remedy import nearest_fit, with_keys

NODE = parse_hardware("a100-40gb:8")


def _config(**train: Any) -> Any:
    return parse_config(
        {
            "model": {"preset": "llama2-7b"},
            "parallel": {"tp": 2, "sequence_parallel": True},
            "train": {"global_batch_size": 64, "seq_length": 4096, **train},
        }
    )


@pytest.mark.parametrize("train", [{"micro_batch_size": 8}, {"micro_batch_size": 4, "recompute": "selective"}, {"micro_batch_size": 1}])
def test_the_advice_is_legal_and_fits(train: dict[str, Any]) -> None:
    config = _config(**train)
    before = estimate(Workload.of(config, 8), NODE).worst.device
    assert before > NODE.gpu.memory_gib * GIB
    text = nearest_fit(config, 8, NODE, machine=NODE.machine)
    option = {key: int(value) if value.isdigit() else value for key, value in re.findall(r"(?:Set | and )([\w.]+)=(\w+)", text)}
    changed = with_keys(config, option)
    assert option and changed is not None and not violations(changed, 8, machine=Machine(cuda=True))
    after = estimate(Workload.of(changed, 8), NODE).worst.device
    assert after <= NODE.gpu.memory_gib * GIB and f"{after / GIB:.2f} GiB" in text
    for key in option:  # nothing in it is idle
        rest = with_keys(config, {k: v for k, v in option.items() if k != key})
        assert rest is not None and (len(option) == 1 or not estimate(Workload.of(rest, 8), NODE).fits)


def test_a_model_that_fits_nowhere_is_told_by_how_much() -> None:
    config = parse_config({"model": {"preset": "llama3-405b"}, "train": {"seq_length": 8192, "global_batch_size": 8}})
    assert re.search(
        r"No single setting here fits: the smallest, .* still needs \d+\.\d\d GiB", nearest_fit(config, 8, NODE, machine=NODE.machine)
    )


def test_a_model_of_8b_on_one_gpu() -> None:
    """6 + 12/dp bytes a parameter: ZeRO-0 and 1 fit into no GPU of 140 GiB, the advice does, and the recipe fits into 80 GB."""
    one = parse_hardware("h200-141gb:1x1")
    for stage in (0, 1):
        raw = {
            "model": {"preset": "llama3.1-8b"},
            "zero": {"stage": stage},
            "train": {"global_batch_size": 4, "micro_batch_size": 1, "seq_length": 4096},
        }
        config = parse_config(raw)
        states = sum(estimate(Workload.of(config, 1), one).worst.parts[part] for part in ("parameters", "gradients", "optimizer"))
        assert states == pytest.approx(18 * config.model.spec.parameters, rel=1e-3) and states > 0.96 * one.gpu.memory_gib * GIB
        assert not estimate(Workload.of(config, 1), one).fits
        assert re.fullmatch(r"Set zero\.[\w.= ]+: the estimate is then \d+\.\d\d GiB\.", nearest_fit(config, 1, one, machine=one.machine))
    recipe = load_config(Path(__file__).parents[2] / "launch" / "recipes" / "llama3.1-8b-one-gpu.yaml")
    assert estimate(Workload.of(recipe, 1), parse_hardware("h200-141gb:1x1")).fits
