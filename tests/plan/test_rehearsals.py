"""`toolkit tune --rehearse`: a plan that its rehearsal refutes falls out, and says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.config.load import parse_config
from toolkit.errors import MachineError
from toolkit.plan.ask import make_question
from toolkit.plan.rehearsals import judge, rehearsal_config, rehearse_plans
from toolkit.plan.tune import Answer, tune
from toolkit.plan.tune_show import tune_json, tune_text

SMALL = {
    "run": {"dir": "unused"},
    "model": {"family": "llama", "num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 512, "vocab_size": 1000}
    | {"num_query_groups": 4, "max_position_embeddings": 128},
    "train": {"global_batch_size": 64, "micro_batch_size": 1, "seq_length": 128, "precision": "bf16", "steps": 10},
}


def answer(*fix: str) -> Answer:
    question = make_question(parse_config(SMALL), "h100-80gb:4", fix=fix, hardware_file=None, calibration=None)
    return tune(question, top=3, what_if=False)


def said(**changes: Any) -> str:
    """What `toolkit rehearse --json` prints of a rank that holds 2 GiB."""
    rank = {"stage": 0, "peak_reserved": 2 * 2**30, "host": {"peak": 2**20}, "step": {"peak": {"phase": "backward 1"}}}
    return "a word of a library\n" + json.dumps({"hardware": "h100", "findings": [], "ranks": [rank | changes.pop("rank", {})]} | changes)


def test_a_plan_that_needs_more_than_was_estimated_falls_out() -> None:
    """DeepSpeed's bucket of ZeRO-2 is more than is left here, ZeRO-1 has none: the first plan goes, the second one becomes the best."""
    found = answer("parallel.tp=1", "zero.stage=2")
    first, second = found.result.plans[0], answer("parallel.tp=1", "zero.stage=1").best
    found.result.plans = [first, second]
    found.question.limits.headroom = 78.0 * 2**30
    rehearsed = rehearse_plans(found, 2)
    assert [r.status for r in rehearsed] == ["does not fit", "fits"]
    assert found.best is second and first not in found.result.plans
    assert "GiB of 79.1" in rehearsed[0].reason and "ZeRO-2" in tune_text(found, rehearsed=rehearsed)
    assert "rehearsed GiB" in tune_text(found, rehearsed=rehearsed, width=200)
    assert [r["status"] for r in tune_json(found, rehearsed=rehearsed)["rehearsals"]] == ["does not fit", "fits"]


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MachineError, match=r"no plan could be rehearsed.*no-such-compiler is not found.*leave out --rehearse"):
        rehearse_plans(answer(), 1)


@pytest.mark.parametrize(
    ("code", "output", "errors", "status", "words"),
    [
        (0, said(), "", "fits", ""),
        (1, said(findings=[{"kind": "order", "text": "rank 0 sends, rank 1 gathers"}]), "", "ranks disagree", "rank 1 gathers"),
        (1, said(rank={"peak_reserved": 80 * 2**30}), "", "does not fit", "stage 0 needs 80"),
        (0, said(rank={"host": {"peak": 10**13}}), "", "does not fit", "host memory"),
        (3, "", "a warning\nerror: rank 0 failed in the rehearsal", "failed", "rank 0 failed"),
        (2, "", "error: offloading to NVMe cannot be rehearsed", "not rehearsed", "NVMe"),
        (-9, "", "", "failed", "exit code -9"),
    ],
)
def test_what_the_command_says_is_the_plans_result(code: int, output: str, errors: str, status: str, words: str) -> None:
    found = answer()
    judged = judge(found.question, found.best, code=code, output=output, errors=errors)
    assert judged.status == status and words in judged.reason
    assert judged.passed == (status in ("fits", "not rehearsed"))


def test_later_micro_batches_are_left_out() -> None:
    found = answer("parallel.tp=1", "parallel.pp=2", "dp=2")
    w = found.best.workload
    config = rehearsal_config(found.question.config, found.best)
    assert config.train.global_batch_size == w.dp * w.micro * min(w.microbatches, 4)
    assert config.parallel.pp == 2
