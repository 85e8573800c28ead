"""What generating takes by the estimate: rules that every refusal names, bytes that follow the cut, and the plainest way that fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from toolkit.arch.spec import ModelSpec
from toolkit.cli import app
from toolkit.config.load import parse_config
from toolkit.cost.generation import Generation, cache_bytes, generation_memory, token_time
from toolkit.errors import ConfigError, LayoutError
from toolkit.hardware.catalogue import Hardware, parse_hardware
from toolkit.parallel.rules import GENERATION_RULES, GenerationCase, generation_violations
from toolkit.plan.generation import check_way, choose

MODEL: dict[str, Any] = {
    **{"family": "llama", "num_layers": 6, "hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 512},
    **{"vocab_size": 1000, "max_position_embeddings": 4096, "tie_embeddings": True},
}
SPEC: ModelSpec = parse_config({"model": MODEL}).model.spec

BROKEN: list[tuple[str, dict[str, Any], list[str]]] = [
    ("int4-columns", {"weights": "int4", "columns": (48, 64)}, ["48 columns", "--weights int8"]),
    ("prune-fours", {"prune": "2:4", "columns": (6, 8)}, ["6 columns", "--prune 0.5"]),
    ("offload-cpu", {"offload": "cpu"}, ["without a GPU", "--offload disk or none"]),
    ("offload-weights", {"offload": "disk", "weights": "int8"}, ["--offload disk beside --weights int8", "--weights none"]),
    ("offload-prune", {"offload": "disk", "prune": "0.5"}, ["--prune 0.5", "--prune none"]),
    ("offload-by-part", {"offload": "disk", "by_part": False}, ["GGUF", "import"]),
    ("offload-zero", {"offload": "zero"}, ["one copy", "--num-procs", "--offload disk or none"]),
    ("kv-cpu", {"kv": "cpu"}, ["without a GPU", "--kv int8 or none"]),
    ("kv-cpu-grow", {"kv": "cpu", "grow": True, "cuda": True}, ["--kv-grow", "--kv none"]),
    ("context", {"context": 4097, "positions": 4096}, ["4097", "--context 4096"]),
]


@pytest.mark.parametrize(("rule", "settings", "words"), BROKEN, ids=[rule for rule, *_ in BROKEN])
def test_a_broken_rule_is_named_and_its_suggestion_mends_it(rule: str, settings: dict[str, Any], words: list[str]) -> None:
    case = GenerationCase(**settings)
    (found,) = generation_violations(case)
    assert found.rule == rule and all(word in str(found) for word in words), str(found)
    assert (found.suggest and not generation_violations(case.changed(found.suggest))) or rule == "offload-by-part"


def test_every_rule_can_be_broken_and_plain_breaks_none() -> None:
    assert {rule for rule, *_ in BROKEN} == {rule.id for rule in GENERATION_RULES}
    assert not generation_violations(GenerationCase.of(SPEC))


def test_bytes_follow_the_cut() -> None:
    """Ranks hold all weights together: once, but norms on each tensor rank and the tied table on both ends."""
    cpu = parse_hardware("cpu:4")
    whole = generation_memory(Generation(model=SPEC), cpu).stages[0]
    assert whole.weights == 2 * SPEC.parameters and whole.cache == 2 * 6 * 2048 * SPEC.key_value
    table = 2 * SPEC.before[0].count
    halves = generation_memory(Generation(model=SPEC, pp=2), cpu).stages
    assert sum(s.weights for s in halves) == whole.weights + table and sum(s.cache for s in halves) == whole.cache
    (part,) = generation_memory(Generation(model=SPEC, tp=2), cpu).stages
    norms = 2 * sum(w.count for w in SPEC.weights() if w.group == "vector")
    assert 2 * part.weights == whole.weights + norms and 2 * part.cache == whole.cache
    streamed = generation_memory(Generation(model=SPEC, offload="disk"), cpu).stages[0]
    assert streamed.model == whole.weights and streamed.weights == whole.weights - 4 * 2 * SPEC.layer_parameters
    assert cache_bytes(Generation(model=SPEC, kv="int8"), layers=6) == whole.cache * (32 + 2) / 64


def test_time_follows_the_bytes() -> None:
    hardware = parse_hardware("h100-80gb:8")
    big = parse_config({"model": {"preset": "llama3-8b", "vocab_size": 128256}}).model.spec
    one = token_time(Generation(model=big), hardware)
    assert 16e9 / 3350e9 < one.token < 16e9 / 1000e9  # its bytes at the memory's full rate, and at a third of it
    assert token_time(Generation(model=big, weights="int8"), hardware).parts["weights"] == pytest.approx(one.parts["weights"] / 2, rel=0.1)
    assert token_time(Generation(model=big, offload="cpu"), hardware).token > 5 * one.token
    huge = parse_config({"model": {"preset": "llama3-70b", "vocab_size": 128256}}).model.spec
    assert token_time(Generation(model=huge, tp=8), hardware).token < 0.75 * token_time(Generation(model=huge), hardware).token
    assert token_time(Generation(model=big, batch=32), hardware).tokens_per_s > 10 * one.tokens_per_s


def small(hardware: Hardware, gib: float) -> Hardware:
    return replace(hardware, gpu=replace(hardware.gpu, memory_gib=gib))


def test_the_plainest_way_that_fits_is_taken() -> None:
    big = parse_config({"model": {"preset": "llama3-8b", "vocab_size": 128256}}).model.spec
    wish, gpus = Generation(model=big), parse_hardware("h100-80gb:4")
    huge = parse_config({"model": {"preset": "llama3-70b", "vocab_size": 128256}}).model.spec
    assert choose(replace(wish, model=huge), gpus).way.tp == 4
    assert choose(wish, gpus).way.world == 1  # its operators are not started faster on more ranks, and messages come on top
    for gib, count, level in (
        (20.0, 1, ("none", "none")),
        (12.0, 1, ("int8", "none")),
        (12.0, 2, ("none", "none")),
        (6.0, 1, ("none", "cpu")),
    ):
        found = choose(wish, small(parse_hardware(f"h100-80gb:{count}"), gib))
        assert (found.way.weights, found.way.offload) == level, (gib, count, found.reasons)
        assert found.memory.fits and any(" fits: " in r for r in found.reasons)
    assert any("the plain model does not fit" in r for r in choose(wish, small(parse_hardware("h100-80gb:1"), 12.0)).reasons)
    lone = small(parse_hardware("h100-80gb:1"), 12.0)
    assert choose(wish, lone, quantiser=False).way.offload == "cpu"
    assert choose(replace(wish, weights="none"), lone, fixed=["weights"]).way.offload == "cpu"
    with pytest.raises(ConfigError, match="fits in no way"):
        choose(wish, small(parse_hardware("h100-80gb:1"), 1.0))


def test_several_prompts_take_copies() -> None:
    found = choose(Generation(model=SPEC, batch=8), parse_hardware("h100-80gb:4"), prompts=64)
    assert found.way.dp == 4 and found.way.batch == 8


def test_what_generate_refuses_is_refused() -> None:
    with pytest.raises(LayoutError, match="--offload cpu"):
        check_way(Generation(model=SPEC, offload="cpu"), parse_hardware("cpu:1"), positions=4096)


def test_command(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"model": MODEL}))

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["estimate", str(config), "--inference", "--hardware", *arguments])

    done = run("h100-80gb:2", "parallel.tp=2", "--batch", "4", "--json")
    found = json.loads(done.output)
    assert done.exit_code == 0 and found["layout"] == {"processes": 2, "tp": 2, "pp": 1, "dp": 1} and found["context"] == 4096
    (stage,) = found["stages"]
    assert stage["kv_cache"] == 4 * 4096 * SPEC.key_value * 6 * 2 / 2
    assert {(c["batch"], c["context"]) for c in found["by_batch_and_context"]} >= {(4, 4096), (32, 1024)}
    text = run("h100-80gb:1", "--weights", "int8").output
    assert "fits" in text and "weights int8" in text and "KV cache" in text
    full = run("cpu:1", "--batch", "20000")
    assert full.exit_code == 1 and "does not fit" in full.output
    for arguments, words in (
        (["h100-80gb:3", "parallel.tp=3"], "parallel.tp to"),
        (["h100-80gb:1", "--context", "5000"], "max_position_embeddings=4096"),
        (["h100-80gb:1", "--batch", "0"], "--batch 0"),
        (["cpu:1", "--offload", "cpu"], "without a GPU"),
    ):
        refused = run(*arguments)
        assert refused.exit_code != 0 and words in str(refused.exception), refused.exception
    alone = CliRunner().invoke(app, ["estimate", str(config), "--hardware", "cpu:1", "--kv", "int8"])
    assert "--kv without --inference" in str(alone.exception)
