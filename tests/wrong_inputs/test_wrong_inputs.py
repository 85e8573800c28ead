"""Whatever a user gets wrong is answered with one message that says what, why and what to set: no
traceback, no hang.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.wrong_inputs.cases import DEADLINE_S, Case, answers, cases, lay_out, plain, run, warm_up

ROOT = Path(__file__).parents[2]
CASES = cases()
# what a library says of a file, and an estimate's figures, are not held here: these answers are
# held up to that point
QUOTING = {"parquet that is none", "tokenizer that is none", "import a gguf that is none"}
QUOTING |= {"tune what is too large", "tune to a step nobody takes"}
LOADING = {"data", "tools"}  # groups with cases that import torch
AS_A_PROCESS = ("misspelt key", "groups that tp does not divide", "mistyped file", "estimate for a mistyped gpu", "import nothing")


@pytest.fixture(scope="module")
def loaded() -> None:
    warm_up()


def held(case: Case, message: str) -> str:
    return message[: message.index(": ", len("error: "))] if case.name in QUOTING else message


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c.group}-{c.name.replace(' ', '-')}") for c in CASES])
def test_the_answer_is_the_one_expected(case: Case, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if case.group in LOADING:
        request.getfixturevalue("loaded")
    lay_out(case, tmp_path)
    found, expected = run(case, tmp_path), answers().get(case.name)
    assert expected is not None, "write it: python -m tests.wrong_inputs.cases"
    assert "Traceback" not in found["message"]
    found["message"], said = held(case, found["message"]), held(case, expected["message"])
    assert (found["code"], found["message"]) == (expected["code"], said), "if it is better: python -m tests.wrong_inputs.cases"


@pytest.mark.parametrize("name", AS_A_PROCESS)
def test_a_process_of_its_own_says_the_same(name: str, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == name)
    lay_out(case, tmp_path)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-m", "toolkit", *case.words]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=8 * DEADLINE_S)
    assert (done.returncode, plain(done.stderr, tmp_path)) == (answers()[name]["code"], answers()[name]["message"])


def test_the_corpus_is_large_and_each_answer_says_what_to_do() -> None:
    assert len(CASES) >= 150
    assert [name for name, count in Counter(c.name for c in CASES).items() if count > 1] == []
    assert set(answers()) == {c.name for c in CASES}
    for name, answer in answers().items():
        assert answer["code"] == 2, name
        assert answer["message"].startswith(("error: ", "Usage: ")), name
