"""The advice where memory ends: legal, near, and sized by the estimate."""

from __future__ import annotations

import re
from typing import Any

import pytest

from toolkit.config.load import parse_config
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
