"""What README.md and launch/ tell a user to run, runs."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from launch.expected import expected, hardware, written
from tests.train.conftest import Started
from toolkit.config.load import load_config, parse_config
from toolkit.hardware.catalogue import parse_hardware
from toolkit.parallel.rules import Machine, check

ROOT = Path(__file__).parents[1]
RECIPES = sorted(p.relative_to(ROOT / "launch" / "recipes") for p in (ROOT / "launch" / "recipes").rglob("*.yaml"))
PROCESSES = {"quickstart.yaml": 2, "llama3.2-1b.yaml": 8, "smollm2-135m.yaml": 2}  # the others say what machine they are for
COMMANDS = [line.split("  #")[0].strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("toolkit ")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout and may be written to."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launch", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command(command: str, checkout: Path, text: Path) -> None:
    words = [str(text) if word == "PATH" else word for word in shlex.split(command)]
    if words[1] == "train":
        words += ["train.steps=2", "optimizer.warmup_steps=0", "train.eval_every=0", "log.every=1"]
    started = Started(checkout, checkout / "none")
    done = started.run([sys.executable, "-m", "toolkit.cli", *words[1:]], timeout_s=900)
    assert done.code == 0, done.output
    if words[1] == "train" and "--dry-run" not in words:
        assert "step 2/2" in done.output


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 3


def test_readme_yaml_is_a_config() -> None:
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block
    raw = yaml.safe_load(block[1])
    raw["zero"].pop("config")  # a file of the reader's
    check(parse_config(raw), 8, machine=Machine(cuda=True))


def test_readme_error_is_what_is_said() -> None:
    quoted = re.search(r"^error: (parallel\.tp=4 .*)$", (ROOT / "README.md").read_text(), re.M)
    raw = {"model": {"num_layers": 2, "hidden_size": 96, "num_attention_heads": 12, "num_query_groups": 3, "ffn_hidden_size": 96}}
    config = parse_config({**raw, "parallel": {"tp": 4}, "train": {"global_batch_size": 4, "precision": "fp32"}})
    with pytest.raises(Exception) as error:
        check(config, 4)
    assert quoted and str(error.value).startswith(quoted[1].split(" Set")[0])


@pytest.mark.parametrize("name", RECIPES, ids=str)
def test_recipe_is_legal_and_says_what_to_expect(name: Path) -> None:
    """A recipe that names its machine fits it, and its comment is today's estimate (`make recipes`
    writes it).
    """
    path = ROOT / "launch" / "recipes" / name
    spec = hardware(path.read_text())
    processes = PROCESSES[name.name] if spec is None else parse_hardware(spec).count
    check(load_config(path), processes, machine=Machine(cuda=name.name != "smollm2-135m.yaml"))
    if spec is not None:
        assert expected(path)["fits"] and written(path) == path.read_text()


@pytest.mark.parametrize(("steps", "below"), [(60, 0.4), pytest.param(200, 0.7, marks=pytest.mark.all_cells)])
def test_quickstart_learns(steps: int, below: float, checkout: Path) -> None:
    """below: by how much, in nats, it must beat a model that only knows how often each byte comes."""
    started = Started(checkout, checkout / "launch" / "recipes" / "quickstart.yaml")
    done = started.train(*([] if steps == 200 else [f"train.steps={steps}"]), procs=2, timeout_s=900)
    assert done.code == 0, done.output
    match = re.search(r"unigram entropy ([0-9.]+) nats", done.output)
    records = [json.loads(line) for line in (checkout / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    assert match and records[-1]["eval_loss"] < float(match[1]) - below
    said = started.run([sys.executable, str(ROOT / "launch" / "next_steps.py"), "runs/quickstart"])
    assert said.code == 0 and "Next:" in said.output
