"""Ranks' messages against each other: what a cluster would hang on is found, with both places in the code."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from toolkit.parallel.layout import Layout
from toolkit.rehearse import match, play

# TP2 x PP2 x DP1: rank = tp + 2 * pp
LAYOUT = Layout(tp=2, pp=2)
ALL, TENSOR, PIPELINE = 0, 1, 2


def answer(rank: int) -> dict[str, Any]:
    """A rank's step: a sum over TP, an activation sent on or received, a sum over all."""
    at = LAYOUT.coordinates(rank)
    other = rank + 2 if at.pp == 0 else rank - 2
    groups = [[0, 1, 2, 3], [2 * at.pp, 2 * at.pp + 1], [at.tp, at.tp + 2]]
    p2p = ["send", PIPELINE, 64, "bf16", other, 0, False, 1e-3, "p2p.py:1 send_forward"]
    if at.pp == 1:
        p2p = ["recv", PIPELINE, 64, "bf16", other, 0, False, 1e-3, "p2p.py:2 recv_forward"]
    total = ["allreduce", ALL, 4, "fp32", None, None, True, 1e-3, "grads.py:3 global_norm"]
    tensor = ["allreduce", TENSOR, 8, "fp32", None, None, True, 1e-3, "grads.py:4 sum_over_tp"]
    order = [tensor, p2p] if at.pp == 0 else [p2p, tensor]
    messages = [*order, total]
    program: list[list[Any]] = [["run", 0, [("mm", 2e-3)], "forward 1"]]
    for i in range(3):
        program += [["message", 0, i], ["wait", 0, i]]
    return {
        "rank": rank,
        **{a: getattr(at, a) for a in match.AXES},
        "groups": groups,
        "step": {"messages": messages, "program": program},
    }


def compared(answers: list[dict[str, Any]]) -> list[match.Finding]:
    return match.compare({rank: sent for rank, (_, sent) in match.cast(LAYOUT, answers).items()})


def played(answers: list[dict[str, Any]]) -> play.Played:
    return play.play(match.cast(LAYOUT, answers))


def test_a_sound_step_agrees_and_ends() -> None:
    answers = [answer(r) for r in range(4)]
    assert not compared(answers)
    step = played(answers)
    assert not step.findings
    # compute, sum over TP, send, sum over TP of the second stage, sum over all: each waits for the one before
    assert step.step_s == pytest.approx(6e-3)
    assert set(step.spans) == {0, 1, 2, 3}


def test_ranks_that_are_not_rehearsed_do_what_their_stage_does() -> None:
    cast = match.cast(LAYOUT, [answer(0), answer(1), answer(2)])
    sent = {m.operation: m for m in cast[3][1]}
    assert sent["recv"].peer == 1 and sent["recv"].group == (1, 3)
    assert {m.group for m in cast[3][1]} == {(0, 1, 2, 3), (2, 3), (1, 3)}


def test_a_send_to_another_rank_has_no_partner() -> None:
    answers = [answer(r) for r in range(4)]
    answers[2]["step"]["messages"][0][4] = 1  # rank 2 listens to the other column
    assert {f.kind for f in compared(answers)} == {"missing"}
    assert any("p2p.py:1 send_forward" in f.text for f in compared(answers))
    assert any("waits for ever" in f.text for f in played(answers).findings)


def test_swapped_sends_of_different_sizes_are_found() -> None:
    answers = [answer(r) for r in range(4)]
    for rank, operation, peer in ((0, "send", 2), (2, "recv", 0)):
        second = [operation, PIPELINE, 128, "bf16", peer, 1, False, 1e-3, f"p2p.py:5 {operation}_backward"]
        answers[rank]["step"]["messages"].append(second)
    assert not compared(answers)
    messages = answers[0]["step"]["messages"]
    messages[1], messages[3] = messages[3], messages[1]
    (found,) = compared(answers)
    assert found.kind == "size" and "p2p.py:5" in found.text and "p2p.py:2" in found.text


def test_two_sends_that_cross_wait_for_ever() -> None:
    """Unbatched, two ranks that both send first on their pair's stream never come to receive."""
    first, second = answer(0), answer(2)
    for a, own, other in ((first, 0, 2), (second, 2, 0)):
        groups = a["groups"]
        send = ["send", PIPELINE, 64, "bf16", other, None, False, 1e-3, f"x.py:{own} send"]
        receive = ["recv", PIPELINE, 64, "bf16", other, None, False, 1e-3, f"x.py:{own} recv"]
        a["step"] = {"messages": [send, receive], "program": [["message", 0, 0], ["message", 0, 1], ["wait", 0, 1]]}
        a["groups"] = groups
    assert not compared([first, second])
    assert {f.kind for f in played([first, second]).findings} == {"waiting"}
    second["step"]["messages"].reverse()
    assert not played([first, second]).findings


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda m: m.pop(2), "missing"),
        (lambda m: m[0].__setitem__(2, 16), "size"),
        (lambda m: m[0].__setitem__(3, "bf16"), "dtype"),
        (lambda m: m[0].__setitem__(0, "broadcast"), "order"),
        (lambda m: m[1].__setitem__(2, 32), "size"),
    ],
)
def test_a_rank_that_differs_is_named_with_both_places(change: Any, kind: str) -> None:
    answers = [copy.deepcopy(answer(r)) for r in range(4)]
    change(answers[0]["step"]["messages"])
    found = compared(answers)
    assert kind in {f.kind for f in found}
    text = next(f.text for f in found if f.kind == kind)
    assert text.count(".py:") == 2 and "rank 0" in text


def test_a_rank_that_skips_an_all_reduce_leaves_the_others_waiting() -> None:
    answers = [copy.deepcopy(answer(r)) for r in range(4)]
    answers[3]["step"]["messages"].pop()
    answers[3]["step"]["program"] = answers[3]["step"]["program"][:-2]
    assert {f.text.split()[1] for f in played(answers).findings} == {"0", "1", "2"}
