"""Doctor finds what is planted on real hosts, names the host, and says what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.doctor.conftest import Clinic
from tests.doctor.defects import DEFECTS, Defect

TOGETHER = [d for d in DEFECTS if d.default and not d.alone]


def red(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [f for f in answer["findings"] if f["status"] == "red"]


def finds(answer: dict[str, Any], defect: Defect) -> bool:
    return any(
        f["check"] == defect.check
        and re.search(defect.found, f"{f['found']} {f['fix']}")
        and f["fix"]
        and (not defect.on or defect.on in f["hosts"])
        for f in red(answer)
    )


def test_hosts_with_nothing_wrong_are_all_green(clinic: Clinic) -> None:
    code, answer = clinic.doctor()
    assert (code, red(answer)) == (0, []) and answer["ok"]
    assert {"reach", "versions", "names", "interface", "port", "link", "all-reduce", "disk", "clock"} <= {
        f["check"] for f in answer["findings"]
    }
    assert len(answer["links"]) == 2 and all(r["right"] for ranks in answer["all_reduce"].values() for r in ranks)
    assert not list(clinic.folder.glob("**/.toolkit-doctor-*"))


def test_a_dozen_defects_are_found_in_one_look(clinic: Clinic) -> None:
    assert len(TOGETHER) >= 10
    with clinic.planted(*TOGETHER):
        code, answer = clinic.doctor()
    assert code == 1
    missed = [d.name for d in TOGETHER if not finds(answer, d)]
    assert not missed, red(answer)
    assert [f["status"] for f in answer["findings"]] == sorted(
        (f["status"] for f in answer["findings"]), key=["red", "yellow", "green"].index
    )


def test_a_refused_key_is_named(clinic: Clinic) -> None:
    defect = next(d for d in DEFECTS if d.name == "its key is refused")
    with clinic.planted(defect):
        code, answer = clinic.doctor()
    assert code == 1 and finds(answer, defect), red(answer)
    assert str(clinic.folder / "key") in red(answer)[0]["found"]


@pytest.mark.all_cells
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_each_defect_is_found_by_itself(clinic: Clinic, defect: Defect) -> None:
    if defect.needs and not Path(defect.needs).exists():
        pytest.skip(f"this defect needs {defect.needs}")
    with clinic.planted(defect):
        code, answer = clinic.doctor(defect.words, environ=defect.environ)
    assert code == 1 and finds(answer, defect), red(answer)
    code, answer = clinic.doctor()
    assert (code, red(answer)) == (0, []), "the defect is still there"


@pytest.mark.all_cells
def test_an_extension_that_is_missing_is_compiled_when_asked_for(clinic: Clinic) -> None:
    words = ["zero.stage=2", "zero.offload_optimizer=cpu"]

    def builds(*more: str) -> tuple[int, list[tuple[str, str]]]:
        code, answer = clinic.doctor([*words, *more], deadline_s=900)
        return code, [(f["status"], f["found"]) for f in answer["findings"] if f["check"] == "builds"]

    missing = ("yellow", "cpu_adam will be compiled at the run's first use")
    assert builds() == (0, [missing, missing])  # each host has a row
    assert builds("--build") == (0, [("green", "no lock; extensions that the config needs are there")])
    assert list((clinic.folder / "extensions").rglob("cpu_adam.so"))
    assert builds()[1][0][0] == "green"
