"""Host memory of offloaded states: what a rehearsal counts is what the estimate says, on files as in RAM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from toolkit.config.load import parse_config
from toolkit.cost import host, memory
from toolkit.cost.workload import Workload
from toolkit.hardware.catalogue import parse_hardware
from toolkit.rehearse import match, play, show
from toolkit.rehearse.session import Job, prepare, refuse_errors, run

HARDWARE = "h100-80gb:2x1"
NOT_LOCKED = {"zero_optimization": {name: {"pin_memory": False} for name in ("offload_optimizer", "offload_param")}}
OFFLOADS: dict[str, dict[str, Any]] = {
    "files": {"stage": 3, "offload_optimizer": "nvme"},
    "files, parameters too": {"stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme"},
    "zero3, parameters too": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
    "zero1": {"stage": 1, "offload_optimizer": "cpu"},
    "zero2": {"stage": 2, "offload_optimizer": "cpu"},
    "zero3, small groups": {"stage": 3, "offload_optimizer": "cpu", "deepspeed": {"zero_optimization": {"sub_group_size": 1_000_000}}},
    "zero3, not locked": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu", "deepspeed": NOT_LOCKED},
    "zero1, not locked": {"stage": 1, "offload_optimizer": "cpu", "deepspeed": NOT_LOCKED},
    "zero2, not locked": {"stage": 2, "offload_optimizer": "cpu", "deepspeed": NOT_LOCKED},
}


def raw(zero: dict[str, Any], folder: Path) -> dict[str, Any]:
    shape = {
        "family": "gpt",
        "num_layers": 2,
        "hidden_size": 512,
        "num_attention_heads": 4,
        "vocab_size": 4000,
        "max_position_embeddings": 64,
    }
    return {
        "model": shape,
        "zero": {**zero, "nvme_path": str(folder / "nvme")},
        "train": {"global_batch_size": 2, "micro_batch_size": 1, "seq_length": 64, "precision": "fp32" if zero["stage"] == 2 else "bf16"},
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("offload")
    cluster = parse_hardware(HARDWARE)
    jobs = [
        Job(config=prepare(parse_config(raw(zero, folder)), cluster)[0], world=2, rank=0, hardware=HARDWARE) for zero in OFFLOADS.values()
    ]
    found = run(jobs)
    refuse_errors(found)
    assert not (folder / "nvme").exists()  # a rehearsal leaves the run's own folders alone
    return dict(zip(OFFLOADS, found, strict=True))


@pytest.mark.parametrize("name", OFFLOADS)
def test_the_estimate_counts_it(name: str, answers: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    w = Workload.of(parse_config(raw(OFFLOADS[name], tmp_path)), 2)
    seen = answers[name]["host"]
    assert host.rank_bytes(w, 0) == pytest.approx(seen["peak"], rel=0.01)
    assert 0 < seen["pinned"] < seen["peak"]
    assert memory.estimate(w, parse_hardware(HARDWARE)).host == 2 * host.rank_bytes(w, 0)


def test_a_step_reads_and_writes_what_is_in_files(answers: dict[str, dict[str, Any]]) -> None:
    """A rank's half of the matrices: master weights and two moments, and gradients of a MiB or
    more; norms and biases stay in RAM.
    """
    step = answers["files"]["step"]
    halves = [x.count // 2 for x in parse_config(raw(OFFLOADS["files"], Path("unused"))).model.spec.weights() if x.group != "vector"]
    moved = sum(12 * n + (4 * n if 4 * n >= host.MIN_SWAPPED else 0) for n in halves)
    assert step["disk"] == {"read": pytest.approx(moved, rel=0.001), "written": pytest.approx(moved, rel=0.001)}
    assert answers["zero1"]["step"]["disk"] == {}
    told = show.text(parse_hardware(HARDWARE), [answers["files"]], play.play(match.cast(_layout(), [answers["files"]])), width=140)
    assert "page-locked" in told and "from files and writes" in told


def _layout() -> Any:
    from toolkit.parallel.layout import Layout

    return Layout(dp=2)


def test_blocks_are_rounded_and_used_again() -> None:
    locked = host.Locked()
    first = locked.add([1000.0, 1024.0, 1025.0])
    assert first == [1024, 1024, 2048] and locked.nbytes == 4096
    locked.free(first[:1])
    locked.add([600.0])  # fits into the free one
    assert locked.nbytes == 4096
    locked.add([600.0])
    assert locked.nbytes == 5120
