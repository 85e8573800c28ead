"""Where a generation's memory and time go on each rank, and which change would help most, from what
bench-inference measured. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HARMLESS = 1.01  # times the plain model's perplexity, up to which a saving counts as one that answers like it
SLOWER = 0.9  # of the plain model's tokens a second, down to which it counts as no slower
MB = 1e6


def rank_line(r: Mapping[str, Any]) -> str:
    """One rank's bytes and milliseconds."""
    token = r["token_ms"]
    return (
        f"rank {r['rank']} (stage {r['stage']}): weights {r['weights'] / MB:.1f} MB, of which other ranks hold "
        f"{r['held_by_others_too'] / MB:.1f} MB too; keys and values {r['kv'] / MB:.2f} MB, {r['kv_unused'] / MB:.2f} MB of them unused; "
        f"freed and kept {r['fragmented'] / MB:.1f} MB; read {r['read'] / MB:.1f} MB; peak {r['peak'] / MB:.0f} MB, {r['free'] / MB:.0f} MB "
        f"free. A token: {sum(token.values()):.1f} ms, of which {token['compute']:.1f} compute, {token['tensor']:.1f} among tensor ranks, "
        f"{token['pipeline']:.1f} sending, {token['waiting']:.1f} waiting"
    )


def analyse(ranks: Sequence[Mapping[str, Any]], variants: Sequence[Mapping[str, Any]], *, model: int) -> list[str]:
    """What stands in the way, one sentence each; the last ones name the change that helps most.
    model: bytes of the whole model.
    """
    said = [line for line in (_read_twice(ranks, model), _uneven(ranks), _idle(ranks), _duplicates(ranks)) if line]
    return said + _helps_most(variants)


def _read_twice(ranks: Sequence[Mapping[str, Any]], model: int) -> str:
    read = sum(r["read"] for r in ranks)
    again = read - model
    if again < 0.05 * model:
        return ""
    return f"{again / MB:.1f} MB are read from disk more than once: {read / MB:.1f} MB in all for a model of {model / MB:.1f} MB."


def _uneven(ranks: Sequence[Mapping[str, Any]]) -> str:
    fullest, emptiest = max(ranks, key=lambda r: r["weights"] + r["kv"]), min(ranks, key=lambda r: r["weights"] + r["kv"])
    most, least = (r["weights"] + r["kv"] for r in (fullest, emptiest))
    if most <= 1.1 * least:
        return ""
    return (
        f"Rank {fullest['rank']} holds {most / max(1, least):.2f} times what rank {emptiest['rank']} does, which has "
        f"{(most - least) / MB:.1f} MB free beside it: the embedding is on the end stages, and parallel.tp shares it out."
    )


def _idle(ranks: Sequence[Mapping[str, Any]]) -> str:
    if len(ranks) == 1:
        return ""
    worst = max(ranks, key=lambda r: r["token_ms"]["waiting"])
    compute = [r["token_ms"]["compute"] for r in ranks]
    total = sum(worst["token_ms"].values()) or 1.0
    return (
        f"Rank {worst['rank']} waits for other stages {100 * worst['token_ms']['waiting'] / total:.0f} % of a token's time; the busiest rank "
        f"computes {max(compute) / (sum(compute) / len(compute) or 1.0):.2f} times the mean."
    )


def _duplicates(ranks: Sequence[Mapping[str, Any]]) -> str:
    twice = sum(r["held_by_others_too"] for r in ranks)
    if twice < 0.02 * sum(r["weights"] for r in ranks):
        return ""
    return f"{twice / MB:.1f} MB of weights are on more than one rank."


def _helps_most(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    plain, others = variants[0], [v for v in variants[1:] if not v["refused"]]

    def saved(v: Mapping[str, Any]) -> float:
        return float(plain["weights"] + plain["cache"] - v["weights"] - v["cache"])

    def words(v: Mapping[str, Any]) -> str:
        return (
            f"{v['name']}: {saved(v) / MB:.1f} MB ({100 * saved(v) / (plain['weights'] + plain['cache']):.0f} %) less on the fullest rank, "
            f"perplexity {100 * (v['perplexity'] / plain['perplexity'] - 1):+.1f} %, {v['decode'] / plain['decode']:.2f} times the tokens a second"
        )

    others = [v for v in others if saved(v) > 0.005 * plain["weights"]]
    if not others:
        return ["No saving that was measured makes the fullest rank smaller."]
    harmless = [v for v in others if v["perplexity"] <= HARMLESS * plain["perplexity"] and v["decode"] >= SLOWER * plain["decode"]]
    most = max(others, key=saved)
    if not harmless:
        return [f"Most is saved by {words(most)}."]
    best = max(harmless, key=saved)
    what = "weights" if plain["weights"] >= plain["cache"] else "keys and values"
    found = [f"What fills the fullest rank are {what}; the change that helps most, and costs neither answers nor time, is {words(best)}."]
    return found + ([f"More is saved by {words(most)}."] if most is not best else [])
