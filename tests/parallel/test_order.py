"""The schedule as integers: every pass once, in an order that can run, as long as theory says."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.parallel.order import ScheduledPass, order, timeline, warmup


@st.composite
def pipelines(draw: st.DrawFn) -> dict[str, int]:
    pp, vpp = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    vpp = 1 if pp == 1 else vpp
    return {"pp": pp, "vpp": vpp, "microbatches": draw(st.integers(1, 4)) * (pp if vpp > 1 else 1)}


@settings(max_examples=60, deadline=None)
@given(p=pipelines())
def test_every_stage_runs_every_pass_once(p: dict[str, int]) -> None:
    expected = {ScheduledPass(kind, m, c) for kind in ("forward", "backward") for m in range(p["microbatches"]) for c in range(p["vpp"])}  # type: ignore[arg-type]
    for stage in range(p["pp"]):
        passes = order(stage=stage, **p)
        assert len(passes) == len(expected) and set(passes) == expected
        ahead = most = 0
        for work in passes:
            ahead += 1 if work.kind == "forward" else -1
            most = max(most, ahead)
        assert most == min(warmup(stage=stage, **p) + 1, p["microbatches"] * p["vpp"])


@settings(max_examples=60, deadline=None)
@given(p=pipelines(), forward=st.integers(1, 5), backward=st.integers(1, 9))
def test_the_timeline_runs_to_its_end_without_overlap(p: dict[str, int], forward: int, backward: int) -> None:
    stages = range(p["pp"])
    passes = timeline(**p, forward=dict.fromkeys(stages, float(forward)), backward=dict.fromkeys(stages, float(backward)))
    assert len(passes) == p["pp"] * p["vpp"] * p["microbatches"] * 2
    for stage in stages:
        mine = [t for t in passes if t.stage == stage]
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(mine))


@pytest.mark.parametrize(("pp", "microbatches"), [(1, 3), (2, 4), (4, 8), (8, 8)])
def test_1f1b_takes_as_long_as_the_paper_says(pp: int, microbatches: int) -> None:
    """arXiv 2104.04473, section 2.2: (m + p - 1) forwards and backwards."""
    passes = timeline(pp=pp, microbatches=microbatches, forward=dict.fromkeys(range(pp), 1.0), backward=dict.fromkeys(range(pp), 2.0))
    assert max(t.end for t in passes) == pytest.approx((microbatches + pp - 1) * 3.0)


def test_interleaving_shortens_the_bubble() -> None:
    """arXiv 2104.04473, section 2.2: the bubble is divided by the number of chunks."""
    times = {"forward": dict.fromkeys(range(4), 1.0), "backward": dict.fromkeys(range(4), 2.0)}
    ends = [max(t.end for t in timeline(pp=4, vpp=vpp, microbatches=8, **times)) for vpp in (1, 2)]
    assert ends[0] == pytest.approx(8 * 3 + 3 * 3) and ends[1] == pytest.approx(8 * 3 + 3 * 3 / 2)
