"""What toolkit offers by name: without torch, as docs/api.md says, from whatever a program means by
a config.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import toolkit
from tests.pool import Pool
from tests.trainer.conftest import Fitted
from toolkit.config.load import as_config
from toolkit.errors import ConfigError, LayoutError

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.S)
HEAVY = {"torch", "deepspeed", "megatron"}


def python(code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_every_public_name_is_shown_in_the_docs() -> None:
    assert set(toolkit.__all__) == set(toolkit._HOMES)
    for name in toolkit.__all__:
        assert any(re.search(rf"from toolkit import .*\b{name}\b", block) for block in BLOCKS), name
        assert any(re.search(rf"^(?!from).*\b{name}\b", block, re.M) for block in BLOCKS), name


def test_the_docs_run(pool: Pool, tmp_path: Path, text: Path) -> None:
    data = {"source": str(text), "workers": 0, "cache_dir": str(text.parent / "data")}
    blocks = [block.replace('    "run":', f'    "data": {data!r},\n    "run":') for block in BLOCKS]
    (said,) = pool.run("tests.trainer.run:code", 1, {"blocks": blocks, "folder": str(tmp_path)}, deadline_s=240)
    assert "4 5." in said, "the first block's step and loss"
    assert "parallel.tp=3" in said and "| loss_change " in said and "data: squares, version 1, shuffled" in said
    assert re.search(r"^True [0-9.]+ [0-9.e-]+$", said, re.M), said


def test_the_readme_runs(pool: Pool, tmp_path: Path, text: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    small = {"data.source": str(text), "data.workers": 0, "data.cache_dir": str(text.parent / "data")}
    small |= {"train.steps": 2, "train.eval_every": 0, "optimizer.warmup_steps": 0, "log.every": 1}
    block = block.replace('{"parallel.tp": 1}', repr({"parallel.tp": 1} | small)).replace('"launch/', f'"{ROOT}/launch/')
    (said,) = pool.run("tests.trainer.run:code", 1, {"blocks": [block], "folder": str(tmp_path)}, deadline_s=120)
    assert "step 2/2" in said and "| loss_squared " in said


@pytest.mark.parametrize("use", ["Config(model={'num_layers': 2, 'hidden_size': 64, 'num_attention_heads': 4})", "Trainer(CONFIG)", "estimate(CONFIG, 'h100-80gb:1')", "tune(CONFIG, 'h100-80gb:1')"])  # fmt: skip
def test_no_torch(use: str) -> None:
    config = "CONFIG = {'model': {'num_layers': 2, 'hidden_size': 64, 'num_attention_heads': 4}}"
    code = f"import sys\nfrom toolkit import Config, Trainer, estimate, tune\n{config}\n{use}\nprint(sorted({HEAVY} & sys.modules.keys()))"
    done = python(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trianer'"):
        toolkit.Trianer  # noqa: B018
    assert "Trainer" in dir(toolkit)


def test_a_config_in_every_form(fitted: Fitted, tmp_path: Path) -> None:
    raw = fitted.config()
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    one = as_config(raw)
    assert as_config(path) == as_config(str(path)) == as_config(one) == as_config(toolkit.Config(**raw)) == one
    changed = as_config(one, {"train.steps": 7, "parallel.tp": 2})
    assert changed == as_config(path, ["train.steps=7", "parallel.tp=2"]) and changed.train.steps == 7
    assert one.train.steps == 4 and raw == fitted.config(), "what is given stays as it is"


def test_a_deepspeed_json_in_a_config(fitted: Fitted, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2, "overlap_comm": true}}')
    raw = fitted.config(zero={"config": str(tmp_path / "ds.json")})
    assert as_config(toolkit.Config(**raw)).zero.stage == 2


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (3, (), "3 is not a config"),
        ({"model": {}, "trian": {}}, (), "trian"),
        ("no/such.yaml", (), "no/such.yaml"),
        ({}, "train.steps=3", "is one text"),
        ({}, {"train.stepz": 3}, "stepz"),
        ({}, {"steps": 3}, "names no section.key"),
        ({}, ["train.steps"], "has no ="),
    ],
)
def test_bad_configs(fitted: Fitted, config: Any, overrides: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        toolkit.Trainer(config or fitted.config(), overrides=overrides)


def test_eval_data_alone(fitted: Fitted) -> None:
    with pytest.raises(ConfigError, match="eval_dataset is given without dataset"):
        toolkit.Trainer(fitted.config(), eval_dataset=[])


def test_the_planner_answers_as_the_command(fitted: Fitted, tmp_path: Path) -> None:
    import json

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(fitted.config()))
    command = [sys.executable, "-m", "toolkit.cli", "estimate", str(path), "--hardware", "a100-80gb:4", "--json", "parallel.tp=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    assert toolkit.estimate(path, "a100-80gb:4", overrides={"parallel.tp": 2}) == json.loads(said)
    answer = toolkit.tune(path, "a100-80gb:4", overrides={"parallel.tp": 2}, fix=["zero.stage=2"], objective="fewest-gpus")
    assert answer.config.parallel.tp == 2 and answer.config.zero.stage == 2 and answer.best.gpus == 2
    with pytest.raises(LayoutError, match=r"parallel\.tp=3"):
        toolkit.estimate(path, "a100-80gb:3", overrides={"parallel.tp": 3})


def test_an_uncaught_error_is_one_message() -> None:
    done = python("from toolkit import Trainer\nTrainer({'modle': {}})")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    done = python("from toolkit import Trainer\ntry:\n    Trainer({'modle': {}})\nexcept Exception:\n    1 / 0")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr
