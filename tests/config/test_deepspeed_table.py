"""Every key that the installed DeepSpeed reads has its place in the table, and the table does what
it says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from toolkit.config.deepspeed_docs import deepspeed_markdown
from toolkit.config.deepspeed_table import KEYS, SAME, SIZE, SWITCH, names
from toolkit.config.describe import field_at
from toolkit.config.load import parse_config
from toolkit.config.schema import RunConfig
from toolkit.errors import ConfigError

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
# documented, and not read while a run with an mpu starts
ELSEWHERE = ["moe", "sequence_parallel_size"]


def merged(data: Any, **sections: Any) -> RunConfig:
    if "optimizer" in data:
        data = {"optimizer": {"type": "Adam", **data["optimizer"]}}
    return parse_config({"model": MODEL, **sections, "zero": {"deepspeed": data}})


class Recorder(dict[str, Any]):
    """A mapping that notes each key that is asked of it; a section that is not there is another one
    of these.
    """

    asked: ClassVar[set[str]] = set()

    def __init__(self, values: dict[str, Any], *, prefix: str = "") -> None:
        super().__init__(values)
        self.prefix = prefix

    def note(self, key: str) -> None:
        Recorder.asked.add(f"{self.prefix}{key}")

    def __contains__(self, key: object) -> bool:
        self.note(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.note(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def __copy__(self) -> Recorder:
        return Recorder(dict(self.items()), prefix=self.prefix)


@pytest.fixture(scope="module")
def asked() -> set[str]:
    """Keys that DeepSpeed's config class asks for, sections of plain mappings included."""
    runtime = pytest.importorskip("deepspeed.runtime.config")
    Recorder.asked = set()
    inner = ("activation_checkpointing", "aio", "data_types")
    sections = {name: Recorder({}, prefix=f"{name}.") for name in inner}
    optimizer = Recorder({"type": "Adam", "params": {}}, prefix="optimizer.")
    runtime.DeepSpeedConfig(Recorder({"train_batch_size": 1, "optimizer": optimizer, **sections}))
    return set(Recorder.asked)


def test_every_key_that_deepspeeds_config_reads_is_listed(asked: set[str]) -> None:
    assert len(asked) > 60
    known = set(KEYS) | {name.partition(".")[0] for name in KEYS}
    assert sorted(asked - known) == []


def test_every_key_of_deepspeeds_models_is_listed() -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime import precision_config as precision
    from deepspeed.runtime.zero import offload_config as offload

    models = {
        "zero_optimization": zero,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
        "fp16": precision.DeepSpeedFP16Config,
        "bf16": precision.DeepSpeedBF16Config,
        "tensorboard": monitor.TensorBoardConfig,
        "wandb": monitor.WandbConfig,
        "csv_monitor": monitor.CSVConfig,
        "comet": monitor.CometConfig,
    }

    def read() -> Iterator[str]:
        for section, model in models.items():
            for name, field in model.model_fields.items():
                yield f"{section}.{name}"
                if field.alias:
                    yield f"{section}.{field.alias}"

    sections = {name.rpartition(".")[0] for name in KEYS}
    assert sorted(set(read()) - set(KEYS) - sections) == []


def test_what_deepspeed_has_removed_is_refused_here() -> None:
    runtime = pytest.importorskip("deepspeed.runtime.config")
    removed = {*runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS, *(f"zero_optimization.{name}" for name in runtime._REMOVED_ZERO_CONFIG_KEYS)}
    assert {KEYS[name].state for name in removed} == {"refused"}


def test_no_key_of_the_table_is_unknown_to_deepspeed(asked: set[str]) -> None:
    runtime = pytest.importorskip("deepspeed.runtime.config")
    removed = set(runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    top = {name for name in KEYS if "." not in name}
    assert sorted(top - asked - removed) == ELSEWHERE


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("dotted", names("refused"))
def test_a_refused_key_ends_the_start_with_its_reason_unless_it_is_off(dotted: str) -> None:
    key = KEYS[dotted]
    harmful: Any = False if key.none_off else True if key.accepts == SWITCH else {"deepcompile": True}
    with pytest.raises(ConfigError) as caught:
        merged(nested(dotted, harmful))
    assert f"{dotted}=" in str(caught.value) and key.note in str(caught.value) and key.fix in str(caught.value)
    for off in ("auto", None, *key.off, *(() if key.none_off else (False, {}) if key.accepts != SWITCH else (False,))):
        assert merged(nested(dotted, off)).zero.deepspeed is None, off


@pytest.mark.parametrize("dotted", [*names("honoured"), *names("passed")])
def test_a_passed_key_reaches_deepspeed(dotted: str) -> None:
    value: Any = {SWITCH: True, SIZE: 2}.get(KEYS[dotted].accepts, 1)
    kept: Any = merged(nested(dotted, value)).zero.deepspeed
    for part in dotted.split("."):
        kept = kept[part]
    assert kept == value


@pytest.mark.parametrize("dotted", names("mapped"))
def test_a_mapped_key_has_a_yaml_key(dotted: str) -> None:
    yaml = KEYS[dotted].yaml
    assert field_at(tuple(yaml.split("."))) is not None, yaml


@pytest.mark.parametrize("dotted", SAME)
def test_a_mapped_value_moves(dotted: str) -> None:
    section, name = SAME[dotted].split(".")
    value: Any = {"device": "cpu", "nvme_path": "/disk", "enabled": True, "stage": 2}.get(dotted.rpartition(".")[2], 4)
    assert str(getattr(getattr(merged(nested(dotted, value)), section), name)) in (str(value), f"{value}.0")


def test_activation_checkpointing_is_recompute() -> None:
    assert merged({"activation_checkpointing": {"number_checkpoints": 2, "profile": False}}).train.recompute == "full"
    boilerplate = {"partition_activations": False, "cpu_checkpointing": False, "number_checkpoints": None}
    config = merged({"activation_checkpointing": boilerplate})
    assert (config.train.recompute, config.zero.deepspeed) == ("none", None)
    for section, says in (
        ({"number_checkpoints": 1}, "the 2 layers is recomputed, or none"),
        ({"cpu_checkpointing": True}, "Set train.recompute to full"),
        ({"partition_activation": True}, "Did you mean activation_checkpointing.partition_activations?"),
    ):
        with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
            merged({"activation_checkpointing": section})
    with pytest.raises(ConfigError, match=r"train.recompute='none' in the YAML contradicts activation_checkpointing.number_checkpoints=2"):
        merged({"activation_checkpointing": {"number_checkpoints": 2}}, train={"recompute": "none"})


def test_the_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs/deepspeed.md"
    assert page.read_text() == deepspeed_markdown(), "run: make docs"
    assert all(f"`{name.rpartition('.')[2]}`" in page.read_text() for name in KEYS)


def test_the_readmes_list_of_refusals_names_the_page() -> None:
    readme = (Path(__file__).parents[2] / "ds_configs/README.md").read_text()
    assert "docs/deepspeed.md" in readme and json.dumps("auto") in readme
