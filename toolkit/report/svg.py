"""SVG marks and axes as text: enough for the charts of a report, escaped, coloured by the page's
style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]


def tag(name: str, content: str = "", /, **attributes: object) -> str:
    """An element; attribute names take _ for -, a None is left out, everything is escaped but content."""
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{text}>{content}</{name}>"


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def label(x: float, y: float, text: str, **attributes: object) -> str:
    return tag("text", escape(text), x=x, y=y, **attributes)


def number(value: float) -> str:
    """A figure for an axis or a table: three digits, thousands parted."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-4 or size == 0 else f"{value:.1e}"


def size(nbytes: float) -> str:
    """Bytes in the binary unit they read best in."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(nbytes) >= 0.95 * scale:
            return f"{nbytes / scale:,.2f} {unit}"
    return f"{nbytes:,.0f} B"


def unit_of(largest: float) -> tuple[str, float]:
    """The binary unit for an axis whose largest value is given in bytes, and its size."""
    return next(((name, scale) for name, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if largest >= scale), ("B", 1))


def duration(seconds: float) -> str:
    """Seconds in the unit they read best in."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return "0 s" if seconds == 0 else f"{seconds:.2e} s"


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Round numbers between two values."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Frame:
    """A drawing area with linear axes; x and y: the values at its ends."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: float = 560.0
    height: float = 240.0
    left: float = 64.0
    right: float = 16.0
    top: float = 12.0
    bottom: float = 42.0

    def at(self, x: float, y: float) -> Point:
        """Pixels of a value."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0) if y1 > y0 else 0.5
        return (
            self.left + across * (self.width - self.left - self.right),
            self.height - self.bottom - up * (self.height - self.top - self.bottom),
        )

    def axes(self, *, x_label: str, y_label: str) -> str:
        """Grid lines, ticks with their figures, and what the axes count."""
        parts = []
        for value in ticks(*self.y, most=5):
            _, y = self.at(self.x[0], value)
            parts.append(tag("line", x1=self.left, x2=self.width - self.right, y1=y, y2=y, class_="grid"))
            parts.append(label(self.left - 8, y + 4, number(value), class_="tick", text_anchor="end"))
        bottom = self.height - self.bottom
        parts.append(tag("line", x1=self.left, x2=self.width - self.right, y1=bottom, y2=bottom, class_="axis"))
        for value in ticks(*self.x, most=7):
            x, _ = self.at(value, self.y[0])
            parts.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
            parts.append(label(x, bottom + 17, number(value), class_="tick", text_anchor="middle"))
        middle = (self.left + self.width - self.right) / 2
        parts.append(label(middle, self.height - 6, x_label, class_="axis-label", text_anchor="middle"))
        upright = (self.top + bottom) / 2
        parts.append(label(14.0, upright, y_label, class_="axis-label", text_anchor="middle", transform=f"rotate(-90 14 {upright:.1f})"))
        return "".join(parts)


def chart(frame_width: float, frame_height: float, content: str, *, name: str, title: str) -> str:
    """A whole picture; name identifies it in the page, title tells a screen reader what it shows."""
    return tag(
        "svg",
        content,
        style=f"max-width: {1.25 * frame_width:.0f}px",
        viewBox=f"0 0 {frame_width:.0f} {frame_height:.0f}",
        class_="chart",
        data_chart=name,
        role="img",
        aria_label=title,
    )


def path(points: Sequence[Point], *, series: int, tip: str | None = None, steps: bool = False, **attributes: object) -> str:
    """A line through pixels; steps: levels that hold until the next point."""
    if not points:
        return ""
    text = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for x, y in points[1:]:
        text += f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}"
    return tag("path", d=text, class_=f"line s{series}", data_series=series, data_tip=tip, **attributes)


def legend(names: Iterable[str], *, switch: bool = True) -> str:
    """Colour keys; switch: a click hides and shows the marks of a key."""
    keys = "".join(
        tag("button", tag("i", class_=f"key s{i}") + escape(name), type="button", class_="legend-key", data_series=i if switch else None)
        for i, name in enumerate(names)
    )
    return tag("div", keys, class_="legend")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1, row_ids: bool = False) -> str:
    """An HTML table; the first text_columns columns are words, the rest figures."""
    top = tag("tr", "".join(tag("th", escape(h), class_=None if i < text_columns else "n") for i, h in enumerate(head)))
    body = ""
    for number_, row in enumerate(rows):
        cells = "".join(tag("td", escape(c), class_=None if i < text_columns else "n") for i, c in enumerate(row))
        body += tag("tr", cells, data_row=number_ if row_ids else None)
    return tag("div", tag("table", tag("thead", top) + tag("tbody", body)), class_="table")
