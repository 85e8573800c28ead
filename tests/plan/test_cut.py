"""The cut of layers over unequal stages, against every cut that there is."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import ConfigError
from toolkit.plan.cut import StagePace, best_cut, choose_cut, even_cut, nearly_even_cut, round_time

seconds = st.floats(1e-6, 1.0)
paces = st.builds(StagePace, layer=seconds, ends=st.one_of(st.just(0.0), seconds), most=st.integers(0, 9))


@given(layers=st.integers(1, 9), stages=st.lists(paces, min_size=1, max_size=4), in_flight=st.integers(1, 5))
def test_no_cut_is_faster(layers: int, stages: list[StagePace], in_flight: int) -> None:
    """Of all cuts in which each stage has a layer and holds what it gets."""
    cuts = [c for c in product(*(range(1, s.most + 1) for s in stages)) if sum(c) == layers]
    found = best_cut(layers, stages, in_flight=in_flight)
    assert (found is None) == (not cuts)
    if found is not None:
        assert found in cuts
        fastest = min(round_time(c, stages, in_flight=in_flight) for c in cuts)
        assert round_time(found, stages, in_flight=in_flight) <= fastest * (1 + 1e-12)


def test_one_in_flight_goes_to_the_fastest_and_many_are_shared_out() -> None:
    stages = [StagePace(layer=1.0, ends=0.0, most=99), StagePace(layer=3.0, ends=0.0, most=99)]
    assert best_cut(12, stages, in_flight=1) == (11, 1)
    assert best_cut(12, stages, in_flight=2) == (9, 3)


def test_a_cut_changes_only_where_that_is_worth_it() -> None:
    equal = [StagePace(layer=1e-3, ends=0.0, most=20), StagePace(layer=1.05e-3, ends=0.0, most=20)]
    stays = choose_cut(12, equal, in_flight=2, worth=0.1)
    assert stays.counts == (6, 6) and "no other one is 10 % faster" in stays.reasons[-1]
    assert choose_cut(12, equal, in_flight=2, now=(9, 3), worth=0.1).counts == (6, 6)
    full = [StagePace(layer=1e-3, ends=0.0, most=20), StagePace(layer=1e-3, ends=0.0, most=2)]
    moved = choose_cut(12, full, in_flight=2, worth=0.1)
    assert moved.counts == (10, 2) and "the even cut 6,6 does not fit" in moved.reasons[-1]
    with pytest.raises(ConfigError, match="the model's 23 layers fit in no cut over 2 stages"):
        choose_cut(23, full, in_flight=2, worth=0.1)


@given(layers=st.integers(1, 40), stages=st.integers(1, 8))
def test_nearly_even(layers: int, stages: int) -> None:
    if stages <= layers:
        counts = nearly_even_cut(layers, stages)
        assert sum(counts) == layers and min(counts) > 0 and len(counts) == stages
        assert not even_cut(layers, stages) or counts == even_cut(layers, stages)
