"""The pictures of docs/long-context.md: which query attends to which key, drawn from the program's own spans."""

from __future__ import annotations

from collections.abc import Sequence

from tests.parallel.test_exchange import pairs_of, place
from toolkit.model.attention import Span, document_spans
from toolkit.model.context import local_spans
from toolkit.report.svg import chart, label, tag

S, CP, SIDE, GAP, TOP = 16, 4, 12, 40, 44
RANKS = ("#3572b0", "#c0392b", "#2e8b57", "#b8860b")
DOCUMENTS = [0, 6, 9, S]
_STYLE = "text{font:12px sans-serif;fill:#444}.none{fill:#f1f1f1}" + "".join(f".r{i}{{fill:{c}}}" for i, c in enumerate(RANKS))
Owners = dict[tuple[int, int], int]


def pictures() -> dict[str, str]:
    """File names and their SVG text."""
    causal = [Span(None, range(S), range(S))]
    masks = [("plain causal", _owned(causal)), ("documents of 6, 3 and 7 tokens", _owned(document_spans(DOCUMENTS, S)))]
    cut = [("a run of tokens each", _neighbours(None)), ("zig-zag", _zig_zag(None)), ("zig-zag with those documents", _zig_zag(DOCUMENTS))]
    return {
        "long-context-masks.svg": _drawn(masks, name="Masks", title="queries downwards attend to keys to the right"),
        "long-context-zigzag.svg": _drawn(cut, name="Zig-zag", title=f"queries of {CP} ranks, a colour each", shares=True),
    }


def _owned(spans: Sequence[Span]) -> Owners:
    return {pair: 0 for span in spans for pair in pairs_of(span)}


def _zig_zag(bounds: list[int] | None) -> Owners:
    size = S // (2 * CP)
    return {
        (place(q, rank, CP, size), k): rank
        for rank in range(CP)
        for span in local_spans(rank, CP, seq_length=S, bounds=bounds)
        for q, k in pairs_of(span)
    }


def _neighbours(bounds: list[int] | None) -> Owners:
    return {(q, k): q * CP // S for q in range(S) for k in range(q + 1)}


def _drawn(parts: Sequence[tuple[str, Owners]], *, name: str, title: str, shares: bool = False) -> str:
    width = len(parts) * (S * SIDE + GAP) + GAP
    marks = label(GAP, 16, title)
    for number, (text, owners) in enumerate(parts):
        left = GAP + number * (S * SIDE + GAP)
        marks += label(left, TOP - 8, text)
        for q in range(S):
            for k in range(S):
                kind = f"r{owners[q, k]}" if (q, k) in owners else "none"
                marks += tag("rect", x=left + k * SIDE, y=TOP + q * SIDE, width=SIDE - 1, height=SIDE - 1, class_=kind)
        if shares:
            work = [100 * list(owners.values()).count(rank) / len(owners) for rank in range(CP)]
            marks += label(left, TOP + S * SIDE + 16, "work: " + ", ".join(f"{w:.0f} %" for w in work))
    height = TOP + S * SIDE + (28 if shares else 12)
    whole = chart(width, height, tag("style", _STYLE) + marks, name=name, title=title)
    return whole.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1) + "\n"
