"""How good predictions are: errors, verdicts, ranking, intervals and sureness, by the definitions of the planner's scorer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from statistics import fmean, median
from typing import Any

GROUP_MIN = 5  # timed rows of one model on one machine, from which a ranking is judged
UNKNOWN_MEMORY = ("cumulative options", "not printed", "GPU not named")  # flags of rows whose memory has no single truth
Row = Mapping[str, Any]


def scored(row: Row) -> bool:
    """Half-precision rows of usual layouts."""
    return row["precision"] in ("bf16", "fp16") and not any("vocabulary placement" in f for f in row["flags"])


def true_rate(row: Row) -> float | None:
    """Measured tokens a second on a GPU, where the source doesn't call it noisy."""
    return None if any("noisy" in f for f in row["flags"]) else row["measured"].get("tokens_per_s_per_gpu") or None


def true_peak(row: Row) -> tuple[float, str] | None:
    """Measured GiB and the field of a prediction that answers it."""
    peak, kind = row["measured"].get("peak_memory_gib"), row["measured"].get("memory_kind") or ""
    if not peak or any(word in flag for flag in row["flags"] for word in UNKNOWN_MEMORY):
        return None
    return peak, "peak_reserved_gib" if kind.startswith(("reserved", "nvidia-smi")) else "peak_allocated_gib"


def group_of(row: Row) -> tuple[Any, ...]:
    """Rows that a ranking compares: one model, machine and batch."""
    m, h = row["model"], row["hardware"]
    return row["source_id"], m["name"], m["layers"], m["hidden"], m["seq_len"], h["gpu"], h["count"], row["batch"]["global"]


def measure(rows: Sequence[Row], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of answers, one for each row: medians over sources, percentiles over rows."""
    rate: dict[str, list[float]] = defaultdict(list)
    signed: dict[str, list[float]] = defaultdict(list)
    size: dict[str, list[float]] = defaultdict(list)
    inside: dict[str, dict[str, list[bool]]] = {"throughput": defaultdict(list), "memory": defaultdict(list)}
    width: dict[str, list[float]] = {"throughput": [], "memory": []}
    groups, brier, sure = defaultdict(list), [], []
    verdicts = {"tp": 0, "fn": 0, "tn": 0, "fp": 0, "missing": 0}
    kept = [(row, answer) for row, answer in zip(rows, answers, strict=True) if scored(row)]
    for row, answer in kept:
        source, ran, ok = row["source_id"], row["measured"].get("fits"), not answer.get("unsupported")
        true = true_rate(row)
        peak = true_peak(row)
        if true:
            groups[group_of(row)].append((true, answer["tokens_per_s_per_gpu"] if ok and answer["fits"] else 0.0))
        if ran is not None:
            name = "missing" if not ok else ("tp" if answer["fits"] else "fn") if ran else ("fp" if answer["fits"] else "tn")
            verdicts[name] += 1
        if not ok:
            continue
        for figure, truth, field in (("throughput", true, "tokens_per_s_per_gpu"), ("memory", *(peak or (None, "")))):
            if not truth:
                continue
            low, high = answer["range"][field]
            inside[figure][source].append(low <= truth <= high)
            width[figure].append((high - low) / truth)
            error = answer[field] / truth - 1
            (rate if figure == "throughput" else size)[source].append(abs(error))
            if figure == "throughput":
                signed[source].append(error)
        if ran is not None:
            brier.append((answer["p_fits"] - bool(ran)) ** 2)
            if answer["p_fits"] >= 0.9:
                sure.append(bool(ran))
    good, bad = verdicts["tp"] + verdicts["fn"], verdicts["tn"] + verdicts["fp"]
    ranked = [_ranking(items) for items in groups.values() if len(items) >= GROUP_MIN]
    answered = sum(not answer.get("unsupported") for _, answer in kept)
    return {
        "rows": len(kept),
        "coverage": _round(answered / max(1, len(kept))),
        "throughput": _errors(rate),
        "memory": _errors(size),
        "fits": verdicts
        | {
            "balanced_accuracy": _round(0.5 * (verdicts["tp"] / good + verdicts["tn"] / bad)) if good and bad else None,
            "false_fits": verdicts["fp"],
        },
        "ranking": {
            "groups": len(ranked),
            "median_spearman": _round(median(rho for rho, _ in ranked)) if ranked else None,
            "mean_top1_regret": _round(fmean(regret for _, regret in ranked)) if ranked else None,
        },
        "intervals": {
            figure: {
                "coverage_mean_over_sources": _round(fmean(fmean(v) for v in by_source.values())) if by_source else None,
                "median_relative_width": _round(median(width[figure])) if width[figure] else None,
                "by_source": {source: _round(fmean(v)) for source, v in sorted(by_source.items())},
            }
            for figure, by_source in inside.items()
        },
        "sureness": {
            "brier": _round(fmean(brier)) if brier else None,
            "said_0.9_or_more": len(sure),
            "of_them_ran": _round(fmean(sure)) if sure else None,
        },
        "per_source": {
            source: {
                "n_throughput": len(rate.get(source, ())),
                "throughput_mdape": _round(median(rate[source])) if rate.get(source) else None,
                "throughput_signed_median": _round(median(signed[source])) if signed.get(source) else None,
                "n_memory": len(size.get(source, ())),
                "memory_mdape": _round(median(size[source])) if size.get(source) else None,
            }
            for source in sorted({*rate, *size})
        },
    }


def _round(value: float) -> float:
    return round(value, 4)


def _errors(by_source: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    every = sorted(error for errors in by_source.values() for error in errors)
    if not every:
        return {"n": 0, "sources": 0, "mdape_median_over_sources": None, "p90_rows": None}
    tenth = every[min(len(every) - 1, ceil(0.9 * len(every)) - 1)]
    middle = median(median(errors) for errors in by_source.values())
    return {"n": len(every), "sources": len(by_source), "mdape_median_over_sources": _round(middle), "p90_rows": _round(tenth)}


def _ranking(items: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Spearman's ρ, and by how much the plan predicted best falls short of the best one."""
    true, guess = [item[0] for item in items], [item[1] for item in items]
    best = max(range(len(items)), key=lambda i: guess[i])
    return spearman(true, guess), 1 - true[best] / max(true)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The correlation of ranks; equal values share the mean of their ranks."""
    a, b = _ranks(one), _ranks(other)
    mean = (len(a) - 1) / 2
    above = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    below = sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    return above / below if below else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    places: dict[float, list[int]] = defaultdict(list)
    for place, value in enumerate(sorted(values)):
        places[value].append(place)
    return [fmean(places[value]) for value in values]
