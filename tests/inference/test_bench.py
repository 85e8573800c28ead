"""What bench-inference measures on ranks, what it says of it, and how the report shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool
from toolkit.errors import DataError
from toolkit.inference.bottleneck import analyse
from toolkit.report.inference import read_bench
from toolkit.report.page import page

PLAIN = {"name": "plain", "weights": 1000e6, "cache": 10e6, "perplexity": 20.0, "decode": 10.0, "refused": ""}


def variant(name: str, **more: Any) -> dict[str, Any]:
    return PLAIN | {"name": name, **more}


def rank(number: int, **more: Any) -> dict[str, Any]:
    token = more.pop("token_ms", {"compute": 10.0, "tensor": 0.0, "pipeline": 0.0, "waiting": 0.0})
    return {"rank": number, "weights": 500e6, "kv": 5e6, "held_by_others_too": 0, "read": 500e6, "token_ms": token} | more


def test_the_change_that_helps_most_is_named() -> None:
    """The largest saving that costs neither answers nor time comes first, a larger one that does
    comes after it.
    """
    variants = [
        variant("plain"),
        variant("weights int8", weights=500e6, perplexity=20.1, decode=12.0),
        variant("weights int4", weights=300e6, perplexity=25.0, decode=15.0),
        variant("layers from disk", weights=100e6, decode=2.0),
        variant("KV int8", cache=1e6),
        variant("KV growing", cache=9e6),
        variant("weights int2", weights=1.0, refused="no such thing"),
    ]
    said = analyse([rank(0), rank(1)], variants, model=1000_000_000)
    assert "weights int8: 500.0 MB (50 %) less" in said[-2] and "layers from disk: 900.0 MB" in said[-1]
    assert "helps most" in said[-2] and "int2" not in " ".join(said)
    assert analyse([rank(0)], [variant("plain"), variant("pruned 0.5")], model=500_000_000)[-1].startswith("No saving")
    (last,) = analyse([rank(0)], [variant("plain"), variant("weights int4", weights=300e6, perplexity=25.0)], model=500_000_000)
    assert last.startswith("Most is saved by weights int4")


def test_bottlenecks_are_named() -> None:
    slow = {"compute": 5.0, "tensor": 0.0, "pipeline": 1.0, "waiting": 14.0}
    ranks = [rank(0), rank(1, weights=800e6, held_by_others_too=300e6, token_ms=slow, read=800e6)]
    said = " ".join(analyse(ranks, [variant("plain")], model=1000_000_000))
    assert "300.0 MB are read from disk more than once: 1300.0 MB in all for a model of 1000.0 MB" in said
    assert "Rank 1 holds 1.59 times what rank 0 does, which has 300.0 MB free beside it" in said
    assert "Rank 1 waits for other stages 70 %" in said and "1.33 times the mean" in said
    assert "300.0 MB of weights are on more than one rank" in said


@pytest.fixture(scope="module")
def measured(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("transformers")
    from tests.inference.asking import made

    folder = made(tmp_path_factory.mktemp("bench"), layers=4)
    asked = {"model": str(folder), "overrides": ["parallel.pp=2"], "max_new_tokens": 64}
    found: dict[str, Any] = pool.run("tests.inference.run:bench", 2, asked, deadline_s=180)[0]
    return found


def test_two_stages_are_measured(measured: dict[str, Any]) -> None:
    plain, kv, disk = measured["variants"]
    assert [v["name"] for v in (plain, kv, disk)] == ["plain", "KV int8", "layers from disk"]
    assert disk["perplexity"] == plain["perplexity"] and disk["agreement"] == 1.0 and kv["cache"] < plain["cache"]
    assert disk["weights"] <= plain["weights"] and all(v["token_ms"] > 0 and v["first_token_ms"] > 0 for v in (plain, kv, disk))
    first, last = measured["ranks"]
    assert first["token_ms"]["pipeline"] > 0 and first["token_ms"]["waiting"] > 0 and last["token_ms"]["waiting"] > 0
    assert all(r["token_ms"]["compute"] > 0 and r["token_ms"]["tensor"] == 0 for r in (first, last))
    assert last["held_by_others_too"] == 384 * 32 * 4  # the tied embedding again, with the rows that pad it
    assert first["read"] == first["weights"] and last["read"] == last["weights"]
    assert first["kv"] * 16 == first["kv_unused"] * 24
    assert any("on more than one rank" in line for line in measured["analysis"])


def test_the_report_shows_it(measured: dict[str, Any], tmp_path: Path) -> None:
    from tests.report.test_report import Balanced

    path = tmp_path / "bench.json"
    path.write_text(json.dumps(measured))
    html = page([], bench=read_bench(path))
    Balanced().feed(html)
    for words in ("layers from disk", "waiting for other stages", "rank 1", "pp 2", measured["analysis"][0].split(",")[0][:20]):
        assert words in html, words
    path.write_text('{"variants": []}')
    with pytest.raises(DataError, match="cannot be shown"):
        read_bench(path)
