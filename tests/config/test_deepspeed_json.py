"""A user's DeepSpeed JSON: filled in, merged, contradicted, refused; and the JSON that DeepSpeed gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.config.load import dump_config, load_config, parse_config
from toolkit.config.schema import RunConfig
from toolkit.errors import ConfigError
from toolkit.parallel.case import Machine
from toolkit.parallel.deepspeed_json import deepspeed_config
from toolkit.parallel.rules import check

TEMPLATES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
GPU = Machine(cuda=True)


def merged(folder: Path, data: Any, **sections: Any) -> RunConfig:
    (folder / "ds.json").write_text(data if isinstance(data, str) else json.dumps(data))
    sections.setdefault("model", MODEL)
    sections.setdefault("zero", {})
    return parse_config({**sections, "zero": {"config": "ds.json", **sections["zero"]}}, base=folder)


def refused(folder: Path, data: Any, **sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        merged(folder, data, **sections)
    return str(caught.value)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    return [value]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
@pytest.mark.parametrize("world_size", [1, 4])
def test_templates_merge_and_leave_no_auto(tmp_path: Path, path: Path, world_size: int) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        "model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4}\n"
        f"train: {{global_batch_size: 8, micro_batch_size: 2, seq_length: 32}}\nzero: {{config: '{path}', nvme_path: /nvme}}\n"
    )
    config = load_config(yaml)
    layout = check(config, world_size, machine=GPU)
    result = deepspeed_config(config, layout)
    assert "auto" not in leaves(result)
    given = json.loads(path.read_text())
    stage = given["zero_optimization"]["stage"]
    assert result["zero_optimization"]["stage"] == config.zero.stage == (1 if stage == "auto" else stage)
    assert (result["train_batch_size"], result["gradient_accumulation_steps"], result["gradient_clipping"]) == (2 * world_size, 1, 1.0)
    yaml.write_text(dump_config(config))
    assert load_config(yaml) == config
    assert deepspeed_config(load_config(yaml), layout) == result


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem)
def test_readme_explains_every_template_and_key(path: Path) -> None:
    readme = (path.parent / "README.md").read_text()
    assert f"`{path.name}`" in readme

    def names(body: dict[str, Any]) -> list[str]:
        inner = [name for value in body.values() if isinstance(value, dict) for name in names(value)]
        return [key for key, value in body.items() if not isinstance(value, dict)] + inner

    unexplained = [name for name in names(json.loads(path.read_text())) if name not in readme and name not in ("block_size", "queue_depth")]
    assert set(unexplained) <= {"intra_op_parallelism", "single_submit", "overlap_events"}  # covered by aio.*


def test_deepspeed_itself_accepts_what_it_gets() -> None:
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config")
    for path in TEMPLATES:
        config = parse_config({"model": MODEL, "zero": {"config": str(path), "nvme_path": "/nvme"}, "train": {"seq_length": 64}})
        section = deepspeed_config(config, check(config, 2, machine=GPU))["zero_optimization"]
        assert zero_config.DeepSpeedZeroConfig(**section).stage == config.zero.stage


def test_without_a_json() -> None:
    config = parse_config(
        {
            "model": MODEL,
            "train": {"global_batch_size": 8, "micro_batch_size": 2, "grad_clip": 0, "precision": "fp16"},
            "log": {"csv": True},
        }
    )
    result = deepspeed_config(config, check(config, 2))
    assert result["zero_optimization"] == {"stage": 1}
    assert (result["gradient_clipping"], result["fp16"], result["bf16"]) == (0.0, {"enabled": True}, {"enabled": False})
    assert (result["train_batch_size"], result["train_micro_batch_size_per_gpu"]) == (4, 2)
    assert result["csv_monitor"] == {"enabled": True, "output_path": "runs/run/logs", "job_name": "csv"}
    assert not {"optimizer", "scheduler"} & result.keys()


def test_the_json_fills_what_the_yaml_leaves_open(tmp_path: Path) -> None:
    data = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale": "auto"},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/disk", "pin_memory": False}},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.98], "eps": "auto", "weight_decay": 0.01}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_num_steps": 5,
                "warmup_type": "linear",
                "warmup_max_lr": 1e-4,
                "warmup_min_lr": 0,
                "total_num_steps": "auto",
            },
        },
        "tensorboard": {"enabled": True, "job_name": "mine"},
        "comet": {"enabled": True},
        "a_key_of_tomorrow": {"x": [1, "auto"]},
        "steps_per_print": 10,
    }
    config = merged(tmp_path, data)
    t, z, o = config.train, config.zero, config.optimizer
    assert (t.global_batch_size, t.micro_batch_size, t.grad_clip, t.precision) == (32, 4, 0.5, "fp16")
    assert (z.stage, z.offload_optimizer, str(z.nvme_path), z.config) == (3, "nvme", "/disk", None)
    assert (o.name, o.lr, o.betas, o.weight_decay, o.schedule, o.warmup_steps) == ("adamw", 1e-4, (0.9, 0.98), 0.01, "linear", 5)
    result = deepspeed_config(config, check(config, 2))
    assert result["fp16"] == {"enabled": True, "initial_scale_power": 8}
    assert result["zero_optimization"]["offload_optimizer"] == {"device": "nvme", "nvme_path": "/disk", "pin_memory": False}
    assert (result["comet"], result["a_key_of_tomorrow"], result["steps_per_print"]) == ({"enabled": True}, {"x": [1, "auto"]}, 10)
    assert result["tensorboard"] == {"enabled": True, "output_path": "runs/run/logs", "job_name": "mine"}
    assert not {"optimizer", "scheduler"} & result.keys()


@pytest.mark.parametrize(
    ("half", "precision"),
    [
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "fp16"),
        ({"fp16": {"enabled": False}}, "fp32"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, "bf16"),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": "auto"}}, "bf16"),
        ({}, "bf16"),
    ],
)
def test_precision_of_the_json(tmp_path: Path, half: dict[str, Any], precision: str) -> None:
    assert merged(tmp_path, half).train.precision == precision


@pytest.mark.parametrize(
    ("data", "sections", "says"),
    [
        ({"zero_optimization": {"stage": 3}}, {"zero": {"stage": 2}}, ["zero.stage=2 in the YAML", "zero_optimization.stage=3 in ds.json"]),
        ({"train_batch_size": 16}, {"train": {"global_batch_size": 8}}, ["train.global_batch_size=8", "train_batch_size=16"]),
        ({"train_micro_batch_size_per_gpu": 2}, {"train": {"micro_batch_size": 1}}, ["train.micro_batch_size=1", "per_gpu=2"]),
        ({"gradient_clipping": 0.5}, {"train": {"grad_clip": 1.0}}, ["train.grad_clip=1.0", "gradient_clipping=0.5"]),
        ({"bf16": {"enabled": True}}, {"train": {"precision": "fp32"}}, ["train.precision='fp32'", "bf16.enabled=true"]),
        ({"bf16": {"enabled": False}}, {"train": {"precision": "bf16"}}, ["train.precision='bf16'", "bf16.enabled=false"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            {"zero": {"offload_optimizer": "none"}},
            ["zero.offload_optimizer='none'", "offload_optimizer.device='cpu'"],
        ),
        (
            {"zero_optimization": {"offload_param": {"nvme_path": "/b"}}},
            {"zero": {"nvme_path": "/a"}},
            ["zero.nvme_path='/a'", "nvme_path='/b'"],
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 1e-4}}},
            {"optimizer": {"lr": 1e-3}},
            ["optimizer.lr=0.001", "optimizer.params.lr=0.0001"],
        ),
        ({"optimizer": {"type": "AdamW"}}, {"optimizer": {"name": "adam"}}, ["optimizer.name='adam'", "'adamw'"]),
        ({"scheduler": {"type": "WarmupLR"}}, {"optimizer": {"schedule": "cosine"}}, ["optimizer.schedule='cosine'", "'constant'"]),
        ({"csv_monitor": {"enabled": True}}, {"log": {"csv": False}}, ["log.csv=false", "csv_monitor.enabled=true"]),
        (
            {"gradient_clipping": 2, "train_batch_size": 4},
            {"train": {"grad_clip": 1, "global_batch_size": 2}},
            ["2 settings", "2 in ", "4 in "],
        ),
    ],
)
def test_contradictions_name_both_values_and_places(tmp_path: Path, data: Any, sections: Any, says: list[str]) -> None:
    message = refused(tmp_path, data, **sections)
    assert all(part in message for part in says), message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{", ["line 1", "column", "not valid JSON"]),
        ('{"a": 1,\n // hm\n}', ["line 2", "comments"]),
        ('{"a": 1, "a": 2}', ["'a' twice"]),
        ('{"gradient_clipping": NaN}', ["NaN"]),
        ("[1]", ["not an object"]),
        ("[" * 100_000, ["cannot be read", "nested"]),
        ({"zero_optimisation": {"stage": 1}}, ["zero_optimisation", "zero_optimization"]),
        ({"gradient_cliping": 1}, ["Did you mean gradient_clipping"]),
        ({"zero_optimization": {"stage": 1, "overlap_com": True}}, ["zero_optimization.overlap_comm"]),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, ["offload_optimizer.device"]),
        ({"zero_optimization": True}, ["zero_optimization=true", "not an object"]),
        ({"zero_optimization": {"stage": 5}}, ["zero.stage=5", "zero_optimization.stage in ds.json"]),
        ({"zero_optimization": {"overlap_comm": "yes"}}, ["overlap_comm='yes'", "true or false"]),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, ["reduce_bucket_size=-1", "a whole number >= 0"]),
        ({"zero_optimization": {"cpu_offload": True}}, ["cpu_offload", '"offload_optimizer": {"device": "cpu"}']),
        ({"zero_optimization": {"compute_grad_norm": False}}, ["compute_grad_norm"]),
        ({"steps_per_print": "often"}, ["steps_per_print='often'"]),
        ({"train_batch_size": "many"}, ["train.global_batch_size='many'", "train_batch_size in ds.json"]),
        ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps=0"]),
        ({"gradient_accumulation_steps": 4}, ["fixes no global batch", "train.global_batch_size"]),
        ({"pipeline": {"stages": 2}}, ["pipeline", "parallel.pp"]),
        ({"managed_gradient_accumulation": True}, ["managed_gradient_accumulation"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op='sum'", "mean"]),
        ({"amp": {"enabled": True}}, ["amp", "train.precision"]),
        ({"elasticity": {"enabled": True}}, ["elasticity", "train.global_batch_size"]),
        ({"sequence_parallel_size": 2}, ["sequence_parallel_size=2", "parallel.sequence_parallel"]),
        ({"data_efficiency": {"enabled": True}}, ["data_efficiency"]),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ["exclude each other"]),
        ({"bf16": {"enabled": "on"}}, ["bf16.enabled='on'"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type='Lamb'", "AdamW, Adam, SGD and Muon"]),
        ({"optimizer": {"type": "SGD", "params": {"betas": [0.9, 0.9]}}}, ["betas", "sgd has lr, weight_decay, momentum and nesterov"]),
        ({"optimizer": {"type": "Muon", "params": {"lr": 0.02, "adam_lr": 1e-3}}}, ["adam_lr=0.001", "muon has lr"]),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}}, ["max_grad_norm", "train.grad_clip"]),
        ({"optimizer": {"params": {}}}, ['"type"']),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9, 2]}}}, ["betas"]),
        ({"scheduler": {"type": "OneCycle", "params": {}}}, ["scheduler.type='OneCycle'", "optimizer.schedule"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}, ["warmup_type='log'", "linear"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-5}}}, ["warmup_min_lr", "from 0"]),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 1e-4}}, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}}},
            ["optimizer.params.lr=0.0001", "warmup_max_lr=0.001"],
        ),
    ],
)
def test_wrong_jsons_are_refused_with_what_to_set(tmp_path: Path, data: Any, says: list[str]) -> None:
    message = refused(tmp_path, data)
    assert all(part in message for part in says), message


def test_what_is_switched_off_is_no_trouble(tmp_path: Path) -> None:
    off = {
        "elasticity": {"enabled": False},
        "pipeline": {},
        "sparse_gradients": False,
        "amp": {"enabled": False},
        "sequence_parallel_size": 1,
    }
    config = merged(
        tmp_path, {**off, "compile": {"deepcompile": False}, "managed_gradient_accumulation": False, "gradient_allreduce_op": "mean"}
    )
    assert config.zero.deepspeed is None


def test_other_optimizers_of_the_json(tmp_path: Path) -> None:
    params = {"lr": 0.1, "momentum": 0.8, "nesterov": True, "dampening": 0, "weight_decay": "auto"}
    o = merged(tmp_path, {"optimizer": {"type": "SGD", "params": params}}).optimizer
    assert (o.name, o.lr, o.spec.momentum, o.spec.nesterov) == ("sgd", 0.1, 0.8, True)
    o = merged(tmp_path, {"optimizer": {"type": "Muon", "params": {"lr": 0.02, "betas": [0.9, 0.99]}}}).optimizer
    assert (o.name, o.lr, o.betas, o.spec.momentum, o.adjust_lr) == ("muon", 0.02, (0.9, 0.99), 0.95, "original")


def test_missing_json_and_place_beside_the_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {preset: gpt2-124m}\nzero: {config: ds.json}\n")
    with pytest.raises(ConfigError, match=r"ds\.json' does not exist"):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    assert load_config(tmp_path / "run.yaml").zero.stage == 2


def test_keys_on_the_command_line_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {preset: gpt2-124m}\nzero: {config: ds.json}\n")
    (tmp_path / "ds.json").write_text('{"aio": {"block_size": 1, "queue_depth": 2}}')
    assert load_config(tmp_path / "run.yaml", ["zero.deepspeed.aio.block_size=3"]).zero.deepspeed == {
        "aio": {"block_size": 3, "queue_depth": 2}
    }


def test_accumulation_must_agree_with_the_layout(tmp_path: Path) -> None:
    config = merged(tmp_path, {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4})
    layout = check(config, 2)
    assert layout.num_microbatches == 4 and deepspeed_config(config, layout)["gradient_accumulation_steps"] == 1
    single = check(parse_config({"model": MODEL, "train": {"global_batch_size": 16, "micro_batch_size": 2}}), 1)
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps=4 .* contradicts train.global_batch_size=16.* 8 micro-batches"):
        deepspeed_config(config, single)
