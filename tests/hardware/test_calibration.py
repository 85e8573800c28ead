"""Fitting the scalars: exact on made-up measurements, one vote a source, held-out sources left out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.evidence.test_published import ROW
from toolkit.cost import constants
from toolkit.cost.step import step_time
from toolkit.evidence import fit
from toolkit.evidence.fitter import Fitter, usable
from toolkit.evidence.published import read_row
from toolkit.hardware import calibration
from toolkit.hardware.catalogue import find_gpu

# so few rows leave every constant at its prior: these are the values that their fit assumes
PRIORS = {name: float(constants.about(name)["prior"]) for name in constants.fitted_names()}


def _measured(source: str, scale: float, **batch: int) -> dict[str, Any]:
    row = copy.deepcopy(ROW) | {"source_id": source}
    row["batch"] |= batch
    workload, hardware = read_row(row)
    with constants.changed(**PRIORS):
        row["measured"]["tokens_per_s_per_gpu"] = step_time(workload, hardware, scale=scale).tokens_per_s_per_gpu
    return row


def _fit(rows: list[dict[str, Any]], **without: str) -> list[dict[str, Any]]:
    return Fitter(usable(rows)).fit(**without).entries


def test_the_scalar_behind_measurements_is_found() -> None:
    (entry,) = _fit([_measured("a", 0.7), _measured("a", 0.7, **{"global": 512}), _measured("b", 0.7)])
    assert (entry["gpu"], entry["precision"], entry["rows"], entry["sources"]) == ("h100", "bf16", 3, ["a", "b"])
    assert entry["scale"] == pytest.approx(0.7, abs=0.005)
    assert entry["bias_left"] == {"a": pytest.approx(0, abs=0.006), "b": pytest.approx(0, abs=0.006)}


def test_a_source_counts_once_and_can_be_held_out() -> None:
    rows = [_measured("many", 0.5) for _ in range(9)] + [_measured("one", 0.9), _measured("other", 0.9)]
    assert _fit(rows)[0]["scale"] == pytest.approx(0.9, abs=0.005)
    assert _fit([r for r in rows if r["source_id"] != "other"], without="one")[0]["scale"] == pytest.approx(0.5, abs=0.005)


def test_fitted_scalars_are_stored_with_their_provenance(tmp_path: Path) -> None:
    path = tmp_path / "calibration.yaml"
    fit.write(_fit([_measured("a", 0.7)]), path=path)
    assert "sources:" in path.read_text() and "- a" in path.read_text()


def test_a_constant_behind_measurements_is_found_and_sources_left_out_do_not_move_it() -> None:
    """Measured with twice the launch time of an operator, by rows in which launches count."""
    rows = []
    for source, launch in (("a", 2e-5), ("b", 2e-5), ("c", 8e-6)):
        with constants.changed(operator_host=launch):
            rows += [_measured(source, 0.7, **{"global": 64 * n}) for n in (1, 2, 4)]
            for row in rows[-3:]:
                row["model"] |= {"hidden": 1024, "ffn_hidden": 2816, "heads": 8, "seq_len": 1024}
                workload, hardware = read_row(row)
                row["measured"]["tokens_per_s_per_gpu"] = step_time(workload, hardware, scale=0.7).tokens_per_s_per_gpu
    fitter = Fitter(usable(rows))
    assert fitter.fit().constants["operator_host"] > 1.5e-5
    assert fitter.fit(without="a").constants["operator_host"] < fitter.fit(without="c").constants["operator_host"]


def test_the_shipped_scalars_are_plausible_and_name_their_sources() -> None:
    entries = calibration.read()
    assert {e["gpu"] for e in entries} >= {"a100", "h100", "b200"}
    assert all(0.3 < e["scale"] <= 1.05 and e["sources"] and e["rows"] >= 1 for e in entries)


def test_unmeasured_gpus_borrow() -> None:
    table = {("h100", "bf16"): 0.8}
    assert calibration.lookup(table, find_gpu("h100-pcie-80gb"), "fp16") == 0.8
    assert calibration.lookup(table, find_gpu("mi300x"), "bf16") == calibration.UNKNOWN
