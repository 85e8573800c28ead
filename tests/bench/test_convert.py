"""The conversion benchmark runs, converts the same model both ways, and its page has a place for its table."""

from __future__ import annotations

from pathlib import Path

from tests.bench.convert import SHAPE, SMALL, measure, table


def test_benchmark(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    found = measure(tmp_path / "w", shape=SMALL, rounds=1)
    # embeddings, and per layer: attention, MLP, two norms; a final norm
    h, kv, f = SMALL["hidden_size"], SMALL["num_key_value_heads"] * SMALL["head_dim"], SMALL["intermediate_size"]
    q = SMALL["num_attention_heads"] * SMALL["head_dim"]
    layer = h * (2 * q + 2 * kv) + 3 * h * f + 2 * h
    assert found["bytes"] == 2 * (SMALL["vocab_size"] * h + SMALL["num_hidden_layers"] * layer + h)
    assert all(row["seconds"] > 0 and row["rss"] > 0 for what in ("import", "export") for row in found["rounds"][what])
    text = table({"disk": found}, 1)
    assert text.count("\n| disk |") == 3
    page = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text()
    assert "<!-- generated: convert -->" in page and "<!-- end: convert -->" in page and SHAPE["num_hidden_layers"] == 16
