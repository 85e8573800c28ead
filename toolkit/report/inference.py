"""The report's section on generating, from what `toolkit bench-inference --json` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from toolkit.errors import DataError
from toolkit.report.svg import Frame, chart, label, legend, number, size, table, tag

KINDS = ("compute", "tensor", "pipeline", "waiting")
NAMES = {"compute": "compute", "tensor": "among tensor ranks", "pipeline": "sending", "waiting": "waiting for other stages"}


def read_bench(path: Path) -> dict[str, Any]:
    """The JSON of bench-inference; DataError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["variants"][0]["name"] != "plain" or not found["ranks"] or not isinstance(found["analysis"], list):
            raise ValueError("its first variant is not the plain model")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
        reason = (e.strerror or str(e)).lower() if isinstance(e, OSError) else f"{type(e).__name__}: {e}"
        raise DataError(
            f"--inference {path} cannot be shown", why=reason, fix="Write it with toolkit bench-inference --json > FILE."
        ) from None
    return dict(found)


def section(bench: Mapping[str, Any]) -> str:
    """What was found, each saving as a row, and each rank's memory and token."""
    layout = bench["layout"]
    what = f"{Path(bench['model']).name} in {bench['dtype']} on {layout['processes']} × {bench['device']}: tp {layout['tp']}, pp {layout['pp']}"
    said = tag("p", escape(what), class_="verdict") + tag("ul", "".join(tag("li", escape(line)) for line in bench["analysis"]))
    savings = tag("div", tag("h3", "What each saving buys and costs") + _savings(bench["variants"]), class_="block")
    ranks = tag("div", tag("h3", "Memory of each rank") + _ranks(bench["ranks"]), class_="block")
    token = tag("div", tag("h3", "Where a token's time goes") + _tokens(bench["ranks"]), class_="block")
    return said + savings + tag("div", ranks + token, class_="pair")


def _savings(variants: Sequence[Mapping[str, Any]]) -> str:
    head = ("", "weights", "KV cache", "memory saved", "peak", "first token", "a token", "time saved", "perplexity", "agreement")
    rows = [
        (v["name"], f"refused: {v['refused']}", *[""] * 8)
        if v["refused"]
        else (
            v["name"],
            size(v["weights"]),
            size(v["cache"]),
            f"{v['memory_saved']:.0f} %",
            size(v["peak"]),
            f"{v['first_token_ms']:.1f} ms",
            f"{v['token_ms']:.1f} ms",
            f"{v['time_saved']:.0f} %",
            f"{v['perplexity']:.3f}",
            f"{100 * v['agreement']:.1f} %",
        )
        for v in variants
    ]
    return table(head, rows)


def _ranks(ranks: Sequence[Mapping[str, Any]]) -> str:
    head = ("rank", "stage", "weights", "held elsewhere too", "KV cache", "unused", "freed and kept", "read", "peak", "free")
    keys = ("weights", "held_by_others_too", "kv", "kv_unused", "fragmented", "read", "peak", "free")
    return table(head, [(str(r["rank"]), str(r["stage"]), *(size(r[k]) for k in keys)) for r in ranks], text_columns=2)


def _tokens(ranks: Sequence[Mapping[str, Any]]) -> str:
    """A bar of each rank, cut into what it does."""
    most = max(sum(r["token_ms"].values()) for r in ranks) or 1.0
    row, left, width = 26.0, 64.0, 520.0
    frame = Frame(x=(0.0, most * 1.04), y=(0.0, 1.0), width=width, height=row * len(ranks) + 30, left=left, top=0.0)
    content = []
    for i, rank in enumerate(ranks):
        at = 0.0
        content.append(label(left - 8, row * i + 17, f"rank {rank['rank']}", class_="tick strong", text_anchor="end"))
        for series, kind in enumerate(KINDS):
            value = rank["token_ms"][kind]
            x0, x1 = frame.at(at, 0)[0], frame.at(at + value, 0)[0]
            tip = f"rank {rank['rank']} · {NAMES[kind]}: {number(value)} ms"
            shape = {"x": x0, "y": row * i + 4, "width": max(0.5, x1 - x0), "height": 18.0}
            content.append(tag("rect", class_=f"mark s{series}", data_series=series, data_tip=tip, **shape))
            at += value
        content.append(label(frame.at(at, 0)[0] + 4, row * i + 17, f"{at:.1f} ms", class_="tick"))
    return legend([NAMES[k] for k in KINDS]) + chart(width, frame.height, "".join(content), name="token-time", title="a token's time")
