"""What a check finds: one row for each thing that is compared, with its verdict. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["pass", "fail", "note", "skip"]
Value = float | str | None

# worst relative difference of (loss, gradient norm) over all steps between a GPU and the CPU that
# the same weights are given to. fp32 with TF32 off has the bounds of the parity suite; in 16 bits,
# two processors round each sum differently.
PROCESSORS = {"fp32": (1e-5, 1e-4), "bf16": (2e-3, 4e-2), "fp16": (5e-4, 2e-2)}


@dataclass(frozen=True, kw_only=True)
class Row:
    """pass and fail answer a bound; a note has none; skip says why nothing was measured."""

    name: str
    verdict: Verdict
    measured: Value = None
    expected: Value = None
    bound: str = ""
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Skip(Exception):
    """A whole check has nothing to do here; the message says why."""


def skipped(name: str, why: str) -> Row:
    return Row(name=name, verdict="skip", note=why)


def within(name: str, measured: float, expected: float, share: float, *, note: str = "") -> Row:
    """Whether a figure is within a share of the expected one."""
    difference = relative(measured, expected)
    verdict: Verdict = "pass" if difference <= share else "fail"
    return Row(name=name, verdict=verdict, measured=measured, expected=expected, bound=f"±{share:.3g}", note=_both(difference, note))


def beside(name: str, measured: float, expected: float, *, note: str = "") -> Row:
    """Two figures without a bound."""
    return Row(name=name, verdict="note", measured=measured, expected=expected, note=_both(relative(measured, expected), note))


def held(name: str, fine: bool, *, measured: Value = None, expected: Value = None, note: str = "") -> Row:
    """Something that is so or is not."""
    return Row(name=name, verdict="pass" if fine else "fail", measured=measured, expected=expected, note=note)


def same_training(
    name: str, found: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]], bounds: tuple[float, float], *, note: str = ""
) -> Row:
    """Losses and gradient norms of two runs, step by step. found and wanted: records of metrics.jsonl."""
    bound = f"loss {bounds[0]:.0e}, norm {bounds[1]:.0e}"
    if [r["step"] for r in found] != [r["step"] for r in wanted] or not wanted:
        return Row(name=name, verdict="fail", measured=f"{len(found)} steps", expected=f"{len(wanted)} steps", bound=bound, note=note)
    worst = [max(relative(a.get(key), b.get(key)) for a, b in zip(found, wanted, strict=True)) for key in ("loss", "grad_norm")]
    fine = worst[0] <= bounds[0] and worst[1] <= bounds[1]
    return Row(
        name=name,
        verdict="pass" if fine else "fail",
        measured=f"loss {worst[0]:.1e}, norm {worst[1]:.1e}",
        bound=bound,
        note=_joined(
            note, f"last loss {found[-1]['loss']:.6f}, expected {wanted[-1]['loss']:.6f}" if not fine and found[-1]["loss"] else ""
        ),
    )


def relative(measured: float | None, expected: float | None) -> float:
    """The difference as a share of what was expected; infinite where one of them is missing."""
    if measured is None or expected is None:
        return 0.0 if measured is expected else math.inf
    return abs(measured - expected) / max(abs(expected), 1e-12)


def _both(difference: float, note: str) -> str:
    return _joined(f"{100 * difference:.1f} % apart" if math.isfinite(difference) else "", note)


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))
