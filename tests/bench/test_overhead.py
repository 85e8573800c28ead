"""The bench runs, compares equal computations, and keeps what people wrote around its tables. No timing is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.overhead import TINY, measure, table, write


def test_one_round_on_a_tiny_shape_and_equal_losses() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    kinds = ["bare", "toolkit-zero1", "hf-zero1"]
    figures = measure(kinds, TINY, rounds=1, steps=1, threads=1)
    bare, *others, hugging_face = figures
    for other in others:
        assert other.losses == pytest.approx(bare.losses, rel=1e-5), other.kind
    assert len(hugging_face.losses) == len(bare.losses) == 4  # 2 at the start, then 1 untimed and 1 timed
    # other initial weights, the same shape and data: near the entropy of uniform ids
    assert hugging_face.losses == pytest.approx(bare.losses, rel=0.05)
    text = table(figures, TINY, rounds=1, steps=1, threads=1)
    assert text.count("\n| ") == 1 + len(kinds)


def test_only_the_text_between_markers_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("above\n<!-- generated: overhead -->\nold\n<!-- end: overhead -->\nbelow\n")
    write(path, {"overhead": "new"})
    assert path.read_text() == "above\n<!-- generated: overhead -->\nnew\n<!-- end: overhead -->\nbelow\n"
    with pytest.raises(SystemExit, match="lacks the markers"):
        write(path, {"startup": "new"})
