"""Scores of predictions, the fit with sources left out, and the widths of intervals, on a licensed sample of published rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.planner import GOLDEN, SAMPLE, golden
from toolkit.cost import constants, spread
from toolkit.cost.spread import Spread
from toolkit.evidence import conform, measures
from toolkit.evidence.evaluate import Evaluation, evaluate
from toolkit.evidence.fit import load_rows
from toolkit.evidence.published import predict

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "planner" / "score_planner.py"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return load_rows(ROOT / SAMPLE)


@pytest.fixture(scope="module")
def evaluation(rows: list[dict[str, Any]]) -> Evaluation:
    few = [row for row in rows if row["source_id"] in ("torchtitan-a100", "torchtitan2412", "mcore-ci", "stas-offload")]
    return evaluate(few)


def test_predictions_of_the_sample_are_the_golden_ones(rows: list[dict[str, Any]]) -> None:
    """A change of a formula or constant shows here; if it is meant, `make score-planner` writes the new figures."""
    known = json.loads((ROOT / GOLDEN).read_text())
    now = golden(rows)
    assert set(now) == set(known) and len(known) >= 70
    for name, figures in now.items():
        assert figures == pytest.approx(known[name], rel=2e-3, abs=2e-3), name


def test_every_constant_of_time_and_memory_moves_a_golden_figure(rows: list[dict[str, Any]]) -> None:
    """But those of software that the sample lacks: old drivers, blocking launches, drives, misaligned heads, our own engine."""
    known = golden(rows)
    absent = {
        "narrow_head",
        "nvme",
        "old_context",
        "old_communicator",
        "launch_wait",
        "misaligned",
        "operator_host",
        "own_spare",
        "own_spare_2",
        "own_spare_3",
    }
    for name in vars(constants.VALUES):
        with constants.changed(**{name: 1.3 * getattr(constants.VALUES, name)}):
            moved = golden(rows) != known
        assert moved != (name in absent), name


def test_each_row_names_its_licence(rows: list[dict[str, Any]]) -> None:
    assert {row["license"] for row in rows} == {"BSD-3-Clause", "Apache-2.0 and BSD-3-Clause", "Apache-2.0", "CC-BY-SA-4.0"}


@pytest.mark.skipif(not SHARED.is_file(), reason="the scorer of the whole file lies beside the repository")
def test_measures_are_those_of_the_scorer(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    answers = [predict(row) for row in rows]
    answers[3] = {"id": rows[3]["id"], "unsupported": "made up"}
    (tmp_path / "rows").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "answers").write_text("".join(json.dumps(a) + "\n" for a in answers))
    command = [sys.executable, str(SHARED), str(tmp_path / "rows"), str(tmp_path / "answers"), "--json"]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    ours = measures.measure(rows, answers)
    for path in (("coverage",), ("throughput", "mdape_median_over_sources"), ("throughput", "p90_rows"), ("memory", "p90_rows")):
        assert _at(ours, path) == pytest.approx(_at(theirs, path), abs=1e-4), path
    for path in (
        ("ranking", "median_spearman"),
        ("intervals", "memory", "coverage_mean_over_sources"),
        ("sureness", "brier"),
        ("fits", "fn"),
    ):
        assert _at(ours, path) == pytest.approx(_at(theirs, path), abs=1e-4), path


def _at(scores: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        scores = scores[name]
    return scores


def test_what_a_source_says_is_not_in_the_fit_that_predicts_it(evaluation: Evaluation) -> None:
    """Its throughputs tenfold change the fit of all, and nothing of its own predictions.

    But for widths: those of other sources' errors, whose fits have seen this one.
    """
    changed = [
        row | {"measured": row["measured"] | {"tokens_per_s_per_gpu": 10 * (row["measured"]["tokens_per_s_per_gpu"] or 0)}}
        if row["source_id"] == "torchtitan-a100"
        else row
        for row in evaluation.rows
    ]
    other = evaluate(changed)
    assert other.fit.scales != evaluation.fit.scales
    assert other.left_out["torchtitan-a100"] == evaluation.left_out["torchtitan-a100"]
    mine = [i for i, row in enumerate(changed) if row["source_id"] == "torchtitan-a100"]
    names = ("tokens_per_s_per_gpu", "peak_allocated_gib", "peak_reserved_gib")
    assert [[other.held_out[i][n] for n in names] for i in mine] == [[evaluation.held_out[i][n] for n in names] for i in mine]


def test_a_prediction_lies_in_its_interval_and_unknown_settings_widen_it(evaluation: Evaluation) -> None:
    for answer in evaluation.held_out:
        for name, (low, high) in answer["range"].items():
            assert low < answer[name] < high
    row = evaluation.rows[0]
    sure, guessed = (
        predict(row | {"inferred_fields": names})["range"]["peak_allocated_gib"] for names in ([], ["batch.micro", "parallel.tp"])
    )
    assert guessed[1] - guessed[0] > 1.2 * (sure[1] - sure[0])


def test_widths_hold_the_share_of_sources_that_they_promise() -> None:
    """Twenty sources of made-up errors: about 80 % of a twenty-first one's lie inside."""
    import numpy as np

    random = np.random.default_rng(0)
    errors = [
        conform.Error(part="time", source=str(s), traits=("plain", "all"), value=float(bias + random.normal(0, 0.03)), unknown=0)
        for s, bias in enumerate(random.normal(0, 0.1, 20))
        for _ in range(30)
    ]
    low, high = conform.widths(errors)["time"]["all"]
    fresh = random.normal(0, 0.1, 4000) + random.normal(0, 0.03, 4000)
    assert 0.7 < np.mean((fresh > low) & (fresh < high)) < 0.93


@pytest.mark.parametrize(("limit", "chance"), [(100.0, 0.5), (110.0, 0.9), (100 / 1.2, 0.1), (1e9, 1.0), (1.0, 0.0)])
def test_the_chance_to_fit_is_that_of_the_interval(limit: float, chance: float) -> None:
    from math import log

    width = Spread(low=-log(1.2), high=log(1.1))
    assert width.chance(100.0, limit) == pytest.approx(chance, abs=1e-6)
    assert width.chance(100.0, 100.0 * width.factor(0.25)) == pytest.approx(0.75, abs=1e-6)


def test_own_rehearsals_are_read(tmp_path: Path) -> None:
    from toolkit.config.explain import validate

    raw = {
        "model": {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32000},
        "zero": {"stage": 1},
        "train": {"global_batch_size": 64, "recompute": "full"},
    }
    seen = {"raw": raw, "reserved": 60 * 2**30}
    (tmp_path / "r.json").write_text(
        json.dumps({"llama-8b tp1 pp1 dp64 ZeRO-1 full bf16, stage 0": seen, "dp1, stage 0": {"raw": raw, "error": "?"}})
    )
    (error,) = conform.rehearsed(tmp_path / "r.json", validate)
    assert error.traits == ("toolkit, ZeRO-1", "toolkit", "all") and 0 < error.value < 0.5
    table = conform.widths([error] * 9)
    assert table["memory"]["toolkit, ZeRO-1"][1] == pytest.approx(max(error.value, 0.05), abs=1e-3)
    assert "all" not in table["memory"] or table["memory"]["all"] != table["memory"]["toolkit"]
    assert spread.RISK == 0.1
