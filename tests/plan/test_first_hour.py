"""What a first hour with `tune` and `estimate` met: plans that do not start, limits with the wrong name, times nobody can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from tests.plan.questions import SHAPE, question
from toolkit.cli import app
from toolkit.config.load import load_config, parse_config
from toolkit.cost.memory import estimate
from toolkit.cost.workload import Workload
from toolkit.data.dataset import resolve_data
from toolkit.data.prepare import prepare
from toolkit.hardware.catalogue import catalogue, parse_hardware
from toolkit.plan.reasons import duration
from toolkit.plan.remedy import enough_gpus, nearest_fit
from toolkit.plan.trials import trial_config
from toolkit.plan.tune import tune
from toolkit.train.resolve import resolve

SMALL = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "max_position_embeddings": 64},
    "train": {"steps": 4, "global_batch_size": 4, "seq_length": 32, "precision": "fp32"},
}


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def refused(*words: str) -> str:
    done = run(*words)
    assert done.exception is not None and not isinstance(done.exception, SystemExit), done.output
    return str(done.exception)


@pytest.fixture
def prepared(text: Path, tmp_path: Path) -> Path:
    """Data made with another tokenizer than the default of data.tokenizer."""
    prefix = tmp_path / "prepared" / "words"
    prepare(str(text), out=prefix, tokenizer="train:300")
    return prefix


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "data": {"source": str(prepared)}, "run": {"dir": str(tmp_path / "run")}}))
    return path


def test_a_written_plan_starts_as_it_is(config: Path, tmp_path: Path) -> None:
    done = run("tune", str(config), "--hardware", "cpu:2", "--out", str(tmp_path / "plan"), "--no-what-if")
    assert done.exit_code == 0, done.output
    ranking = json.loads((tmp_path / "plan" / "tune.json").read_text())
    resolved = resolve(load_config(tmp_path / "plan" / "run.yaml"), ranking["best"]["gpus"])
    assert resolved.config.data.tokenizer == "train:300"


def test_a_trial_starts_as_it_is(config: Path, tmp_path: Path) -> None:
    asked = question("cpu:1", model=SMALL["model"] | {"vocab_size": 512}, batch=4, seq=32)
    asked.config = load_config(config)
    plan = asked.ask(top=1).plans[0]
    trial, _ = trial_config(asked.config, plan, tmp_path, steps=2)
    assert resolve_data(trial, prepare_missing=False).tokenizer == "train:300"


def test_tune_takes_the_vocabulary_from_prepared_data(config: Path) -> None:
    done = run("tune", str(config), "--hardware", "cpu:2", "--no-what-if")
    assert done.exit_code == 0 and "vocab_size is null" not in done.output
    unknown = run("tune", str(config), "data.source=python-stdlib", "--hardware", "cpu:2", "--no-what-if")
    assert unknown.exit_code == 0 and "vocab_size is null" in unknown.output


def test_a_number_for_hpz_asks_for_stage_3_and_whole_groups(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}')
    model = ", ".join(f"{key}: {value}" for key, value in SHAPE.items())
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{{model}}}\nzero: {{config: {tmp_path}/ds.json}}\ntrain: {{global_batch_size: 8, seq_length: 1024}}\n")
    done = run("tune", str(path), "--hardware", "h100:8", "--json", "--no-what-if")
    assert done.exit_code == 0, done.output
    layouts = [plan["layout"] for plan in json.loads(done.output)["plans"]]
    assert layouts and all(way["zero"] == 3 and way["dp"] % 4 == 0 and way["tp"] == 1 for way in layouts)
    text = refused("tune", str(path), "train.global_batch_size=6", "--hardware", "h100:8")
    assert "zero.stage=1" not in text and "train.global_batch_size=6" in text


def test_a_what_if_names_a_gpu_that_exists() -> None:
    answer = tune(question("a100-40gb:4"), top=1)
    assert answer.what_if[0].change == "A100-80GB instead"
    assert {gpu.upper() for gpu in catalogue()} >= {answer.what_if[0].change.removesuffix(" instead")}


def test_long_times_are_said_as_people_say_them() -> None:
    assert [duration(s) for s in (0.25, 99, 600, 10_000, 400_000)] == ["0.25 s", "99 s", "10.0 min", "2.8 hours", "4.6 days"]


def test_the_whole_run_has_a_time(config: Path) -> None:
    assert "the whole run of 4 steps: " in run("tune", str(config), "--hardware", "cpu:2", "--no-what-if").output
    assert "the whole run of 4 steps: " in run("estimate", str(config), "--hardware", "cpu:2").output


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.yaml"
    path.write_text("model: {preset: llama3-70b}\ntrain: {steps: 1000, global_batch_size: 64, seq_length: 4096}\n")
    return path


OFFLOADED = ("zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_param=cpu", "train.recompute=full")


def test_estimate_says_no_with_its_exit_code(config: Path, large: Path) -> None:
    assert run("estimate", str(config), "--hardware", "h100:2").exit_code == 0
    for shown in ((), ("--json",)):
        assert run("estimate", str(large), "--hardware", "a100-40gb:8", *shown).exit_code == 1


def test_the_limit_that_binds_is_named(large: Path) -> None:
    text = " ".join(run("estimate", str(large), "--hardware", "a100-40gb:1", *OFFLOADED).output.split())
    assert "does not fit into the RAM of a node: " in text and "The RAM of a node is the limit here, not GPU memory" in text
    assert "does not fit into GPU memory: " in " ".join(run("estimate", str(large), "--hardware", "a100-40gb:8").output.split())
    answer = json.loads(run("estimate", str(large), "--hardware", "a100-40gb:1", "--json", *OFFLOADED).output)
    assert answer["limits"] == ["host"]
    assert "limited by the RAM of a node: " in refused("tune", str(large), "--hardware", "a100-40gb:1")
    assert "which none in the catalogue has" not in refused("tune", str(large), "--hardware", "a100-40gb:1")


def test_the_number_of_gpus_in_the_advice_is_legal_and_enough(large: Path) -> None:
    config, node = load_config(large), parse_hardware("a100-40gb:8")
    assert enough_gpus(config, 8, node, machine=node.machine) in nearest_fit(config, 8, node, machine=node.machine)
    told = enough_gpus(config, 8, node, machine=node.machine)
    gpus, _, settings = told.removesuffix(".").partition(" GPUs are enough")
    keys = dict(pair.split("=") for pair in settings.removeprefix(", with ").split(" and ") if pair)
    raw = config.model_dump()
    for key, value in keys.items():
        section, name = key.split(".")
        raw[section][name] = int(value) if value.isdigit() else value
    changed, cluster = parse_config(raw), parse_hardware(f"a100-40gb:8x{int(gpus) // 8}")
    assert run("estimate", str(large), *(f"{k}={v}" for k, v in keys.items()), "--hardware", str(cluster)).exit_code == 0
    assert estimate(Workload.of(changed, int(gpus)), cluster).fits
