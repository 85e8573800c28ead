"""What was expected of a run beside what came of it: the same figures and intervals as `toolkit estimate`, and where a run lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.config.load import parse_config
from toolkit.config.schema import RunConfig
from toolkit.cost.workload import Workload
from toolkit.evidence.expected import PEAK, RATE, STEP, of_folder, of_profile, of_run
from toolkit.hardware.catalogue import parse_hardware
from toolkit.parallel.deepspeed_json import deepspeed_config
from toolkit.parallel.layout import Layout
from toolkit.plan.show import estimate_json
from toolkit.profile import predict
from toolkit.runfolder.files import write_machine, write_run


def _config(folder: Path = Path("runs/big")) -> RunConfig:
    model = {"preset": "llama3-8b", "vocab_size": 128256}
    train = {"global_batch_size": 16, "micro_batch_size": 1, "seq_length": 4096, "precision": "bf16", "recompute": "full"}
    return parse_config({"model": model, "train": train, "parallel": {"tp": 2, "sequence_parallel": True}, "run": {"dir": str(folder)}})


HARDWARE = parse_hardware("h100-80gb:8")


def test_it_expects_what_estimate_says() -> None:
    told = estimate_json(_config(), HARDWARE)
    by_name = {f.name: f for f in of_run(_config(), HARDWARE, rate=told["tokens_per_s"], peak_gib=told["peak_allocated_gib"])}
    for name, key in ((RATE, "tokens_per_s"), (STEP, "step_s"), (PEAK, "peak_allocated_gib")):
        figure = by_name[name]
        assert figure.likely == pytest.approx(told[key], rel=1e-3)
        assert [figure.low, figure.high] == pytest.approx(told["range"][key], rel=1e-3)
        assert figure.verdict == "inside" and figure.low < figure.likely < figure.high


@pytest.mark.parametrize(("share", "verdict"), [(0.5, "below"), (0.97, "inside"), (2.0, "above")])
def test_the_verdict_follows_the_interval(share: float, verdict: str) -> None:
    (rate, _, peak) = of_run(_config(), HARDWARE, rate=1.0, peak_gib=1.0)
    (again, step, held) = of_run(_config(), HARDWARE, rate=share * rate.likely, peak_gib=share * peak.likely)
    assert again.verdict == verdict == held.verdict
    assert step.verdict == {"below": "above", "above": "below"}.get(verdict, verdict)


def _trained(folder: Path, *, device: str) -> Path:
    config = _config(folder)
    layout = Layout.of(config, 8)
    write_run(config, deepspeed_config(config, layout))
    write_machine(folder, device=device, processes=8, hosts=1)
    records = [{"step": i, "loss": 1.0, "tokens_per_s": 40_000.0, "step_s": 65536 / 40_000, "memory_gib": 50.0} for i in range(1, 11)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_a_run_folder_is_set_against_its_own_machine(tmp_path: Path) -> None:
    figures, why = of_folder(_trained(tmp_path, device="NVIDIA H100 80GB HBM3"))
    assert why == "" and [f.name for f in figures] == [RATE, STEP, PEAK]
    assert [f.measured for f in figures] == pytest.approx([40_000.0, 65536 / 40_000, 50.0])
    assert figures == of_run(_config(), HARDWARE, rate=40_000.0, peak_gib=50.0)


def test_resident_memory_is_not_held_against_an_estimate_of_tensors(tmp_path: Path) -> None:
    figures, _ = of_folder(_trained(tmp_path, device="cpu"))
    assert [f.name for f in figures] == [RATE, STEP]


def test_what_nothing_can_be_expected_of_says_why(tmp_path: Path) -> None:
    figures, why = of_folder(_trained(tmp_path, device="Voodoo 2"))
    assert (figures == [] and "Voodoo 2" in why) or "hardware" in why
    assert of_folder(tmp_path / "nowhere") == ([], "")


def test_a_profile_holds_the_intervals_it_was_made_with() -> None:
    config = _config()
    w = Workload.of(config, 8)
    told = json.loads(json.dumps(predict.as_json(w, HARDWARE)))
    peak = told["memory"]["0"]["peak"]
    rank: dict[str, Any] = {"memory": {"peak": peak * 2}, "seconds": {"step": told["seconds"]["step"]}}
    profile = {"config": json.loads(config.model_dump_json()), "predicted": told, "ranks": [rank]}
    rate, step, held = of_profile(profile)
    assert (rate.verdict, step.verdict, held.verdict) == ("inside", "inside", "above")
    assert [rate.low, rate.high] == pytest.approx(estimate_json(config, HARDWARE)["range"]["tokens_per_s"])
    assert held.measured == pytest.approx(2 * held.likely)
    del told["range"]  # as an earlier version wrote it
    assert of_profile(profile) == []


def test_a_gpu_that_the_catalogue_lacks_has_memory_alone() -> None:
    hardware = predict.hardware_here(gpu="Voodoo 2", ranks=8)
    told = predict.as_json(Workload.of(_config(), 8), hardware)
    assert set(told["range"]) == {"peak"} and told["seconds"] == {}
