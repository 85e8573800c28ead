"""Which attributes a rule looks at: what it does not look at changes no answer."""

from __future__ import annotations

from copy import copy
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.config.load import parse_config
from toolkit.parallel.case import Case, Machine
from toolkit.parallel.narrow import attributes_read, rules_by_group
from toolkit.parallel.rule import Rule
from toolkit.parallel.table import RULES

NUMBERS = st.integers(1, 12)
CHOICES: dict[str, st.SearchStrategy[Any]] = {
    "recompute": st.sampled_from(("none", "selective", "full")),
    "exchange": st.sampled_from(("auto", "allgather", "ulysses", "ring")),
    "optimizer": st.sampled_from(("adamw", "muon", "sgd")),
    "opt_offload": st.sampled_from(("none", "cpu", "nvme")),
    "param_offload": st.sampled_from(("none", "cpu", "nvme")),
    "schedule": st.sampled_from(("constant", "linear", "cosine", "wsd")),
    "stage": st.integers(0, 3),
    "widest": st.tuples(NUMBERS, NUMBERS),
}


def _values(name: str, now: Any) -> st.SearchStrategy[Any]:
    return CHOICES[name] if name in CHOICES else st.booleans() if isinstance(now, bool) else NUMBERS


BASE = Case.of(parse_config({"model": {"preset": "llama3-8b"}, "train": {"global_batch_size": 8}}), 1, machine=Machine())
NAMES = [f.name for f in fields(Case)]


@given(data=st.data())
def test_an_attribute_that_a_rule_does_not_look_at_changes_no_answer(data: st.DataObject) -> None:
    case = copy(BASE)
    for name in NAMES:
        setattr(case, name, data.draw(_values(name, getattr(BASE, name)), label=name))
    before = {rule.id: bool(rule.broken(case)) for rule in RULES}
    changed = data.draw(st.sampled_from(NAMES))
    setattr(case, changed, data.draw(_values(changed, getattr(BASE, changed))))
    for rule in RULES:
        if changed not in attributes_read(rule.broken):
            assert bool(rule.broken(case)) == before[rule.id], f"{rule.id} looks at {changed}"


@pytest.mark.parametrize(
    ("rule_id", "read"),
    [
        ("tp-heads", {"tp", "heads"}),  # by getattr()
        ("hpz-dp", {"hpz", "world", "tp", "pp", "cp"}),  # by a property
        ("decay", {"schedule", "warmup", "decay", "steps"}),  # by a method
        ("nvme-path", {"nvme_path", "opt_offload", "param_offload"}),
    ],
)
def test_what_a_rule_looks_at_is_found_in_its_code(rule_id: str, read: set[str]) -> None:
    (rule,) = (rule for rule in RULES if rule.id == rule_id)
    assert attributes_read(rule.broken) == read


def test_a_function_that_a_rule_calls_is_looked_into() -> None:
    assert attributes_read(lambda case: _uneven(case) and case.sp) == {"sp", "batch", "micro"}


def _uneven(case: Case) -> bool:
    return any(case.batch % micro for micro in (case.micro,))


def test_every_rule_is_in_one_group() -> None:
    groups = rules_by_group({"cut": ("tp", "pp"), "zero": ("stage",)})
    assert sorted(map(id, (broken for listed in groups.values() for broken in listed))) == sorted(id(rule.broken) for rule in RULES)
    names: dict[Any, Rule[Case]] = {rule.broken: rule for rule in RULES}
    assert {names[b].id for b in groups[frozenset({"zero"})]} >= {"compile-stage", "muon-stage"}
    assert "pp-layers" in {names[b].id for b in groups[frozenset({"cut"})]}
