"""Reading a YAML, overrides, and one clear message for everything that can be wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.config.load import dump_config, load_config, parse_config
from toolkit.config.presets import PRESETS
from toolkit.errors import ConfigError

MODEL = "model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4}\n"


def write(folder: Path, text: str | bytes, *, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_the_documented_example_loads(tmp_path: Path) -> None:
    text = """
run:        {dir: runs/tiny, seed: 1234}
model:      {family: llama, preset: null, impl: local, num_layers: 4, hidden_size: 64, num_attention_heads: 4, num_query_groups: 2,
             head_dim: null, ffn_hidden_size: 128, vocab_size: null, max_position_embeddings: 128, tie_embeddings: false, dropout: 0.0,
             qk_layernorm: false, rope_theta: 10000.0, rope_scaling: null, norm_eps: 1.0e-5, init_std: 0.02, compile: false}
parallel:   {tp: 1, pp: 1, vpp: 1, cp: 1, sequence_parallel: false}
zero:       {stage: 1, offload_optimizer: none, offload_param: none, nvme_path: null, config: null}
train:      {steps: 20, global_batch_size: 8, micro_batch_size: 2, seq_length: 32, precision: fp32, recompute: none, grad_clip: 1.0,
             eval_every: 0, eval_steps: 0, on_nonfinite: stop}
optimizer:  {name: adamw, lr: 1.0e-3, min_lr: 0.0, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1, schedule: cosine, warmup_steps: 0,
             decay_steps: null}
data:       {source: python-stdlib, tokenizer: bytes, split: [98, 1, 1], blend: null, workers: 2, cache_dir: null}
checkpoint: {dir: null, every: 0, keep: 2, resume: auto, async_save: true, init_from: null}
log:        {every: 1, tensorboard: false, wandb: false}
"""
    config = load_config(write(tmp_path, text))
    assert (config.model.head_dim, config.train.precision, config.optimizer.betas) == (16, "fp32", (0.9, 0.95))


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = write(tmp_path, MODEL + "optimizer: {lr: 1e-3, eps: 1E-8, betas: [.9, 95e-2]}\nrun: {seed: 010}\ntrain: {steps: 1_000}\n")
    config = load_config(path, ["optimizer.min_lr=1e-5", "train.grad_clip=5e-1", "optimizer.warmup_steps=2e1"])
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.betas) == (1e-3, 1e-8, (0.9, 0.95))
    assert (config.optimizer.min_lr, config.train.grad_clip, config.optimizer.warmup_steps) == (1e-5, 0.5, 20)
    assert (config.run.seed, config.train.steps) == (10, 1000)


def test_overrides_of_every_shape(tmp_path: Path) -> None:
    path = write(tmp_path, MODEL + "train:\n")
    overrides = [
        "train.steps=7",
        "optimizer.betas=[0.8, 0.9]",
        "data.blend={a: 1, b: 2.5}",
        "model.preset=",
        "run.dir=runs/a=b",
        "model.rope_scaling.factor=4",
        "log.csv=true",
        "zero.deepspeed.aio.block_size=4096",
    ]
    config = load_config(path, overrides)
    assert (config.train.steps, config.optimizer.betas, config.data.blend) == (7, (0.8, 0.9), {"a": 1.0, "b": 2.5})
    assert config.model.preset is None and config.model.rope_scaling is not None and config.model.rope_scaling.factor == 4
    assert (str(config.run.dir), config.log.csv, config.zero.deepspeed) == ("runs/a=b", True, {"aio": {"block_size": 4096}})


@pytest.mark.parametrize("preset", PRESETS)
def test_dump_and_load_round_trip(tmp_path: Path, preset: str) -> None:
    config = parse_config({"model": {"preset": preset}, "optimizer": {"lr": 1e-5, "eps": 1e-15}, "data": {"blend": {"x: y": 0.1}}})
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    "text", ["1e-3", "1:30", "2024-01-01", "010", "null", "yes", ".5", "0x1f", "1_0", "~", "- a", "é", "", " x ", "<<", "="]
)
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, text: str) -> None:
    config = parse_config(
        {"model": {"preset": "gpt2-124m"}, "data": {"tokenizer": text, "blend": {text: 1}}, "zero": {"deepspeed": {"x": {text: text}}}}
    )
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config and again.data.tokenizer == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {step: 3}", ["train.step is not a known key", "train.steps"]),
        ("parallel: {stage: 1}", ["parallel.stage", "zero.stage"]),
        ("trian: {steps: 3}", ["trian is not a section", "train"]),
        ("steps: 3", ["steps", "train.steps"]),
        ("train: {steps: 0}", ["train.steps=0", "an integer >= 1"]),
        ("train: {steps: yes}", ["train.steps=true", "an integer >= 1"]),
        ("log: {csv: 1}", ["log.csv=1", "true or false"]),
        ("train: {precision: fp8}", ["train.precision='fp8'", "fp32, bf16 or fp16"]),
        ("train: {precision: }", ["train.precision=null", "fp32, bf16 or fp16"]),
        ("train: {steps: 99999999999}", ["train.steps=99999999999", "2147483647"]),
        ("optimizer: {lr: .nan}", ["optimizer.lr=nan", "a number >= 0"]),
        ("optimizer: {lr: 1e-4, min_lr: 1e-3}", ["min_lr=0.001", "lr=0.0001"]),
        ("data: {split: [1, 2]}", ["data.split", "3 numbers"]),
        ("train: 3", ["train=3", "not a section"]),
        ("1: {a: b}", ["the key 1", "not a name"]),
        ("run: {2: b}", ["the key 2 in 'run'", "not a name"]),
        ('run: {dir: "a\\0b"}', ["run.dir", "character"]),
        ("model: {preset: null, hidden_size: 10}", ["the key 'model' is given twice", "line 2"]),
        ("train: {steps: 3, steps: 4}", ["the key 'steps' is given twice", "line 2"]),
        ("train: {steps: 3", ["line 2", "not valid YAML"]),
        ("train: {steps: !!int ''}", ["YAML tag"]),
        ("train: {steps: !!python/object:os.system x}", ["line 2", "not valid YAML"]),
        ("model2: " + "[" * 3000, ["nested too deeply"]),
        ("train: &a {steps: *b}", ["undefined alias", "line 2"]),
        ("zero: {deepspeed: &a {x: *a}}", ["zero.deepspeed", "JSON"]),
    ],
)
def test_wrong_files_name_key_value_and_cure(tmp_path: Path, text: str, says: list[str]) -> None:
    message = refused(write(tmp_path, MODEL + text))
    assert all(part in message for part in says), message


def test_all_wrong_keys_in_one_error(tmp_path: Path) -> None:
    message = refused(write(tmp_path, MODEL + "train: {steps: -1, precison: bf16}\nzero: {stage: 4}"))
    assert all(part in message for part in ("3 settings", "train.steps=-1", "train.precision", "zero.stage=4")), message


def test_missing_shape_offers_a_preset(tmp_path: Path) -> None:
    assert "model.num_layers is missing" in refused(write(tmp_path, "model: {hidden_size: 8, num_attention_heads: 2}"))
    assert "model.preset" in refused(write(tmp_path, ""))


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"\xff\xfe\x00", "UTF-8"), (b"- a\n- b", "not sections"), (b"text", "not sections"), (b"a: \x01", "not valid YAML")],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, says: str) -> None:
    assert says in refused(write(tmp_path, content))


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none.yaml")
    assert "is a folder" in refused(tmp_path)
    assert "cannot be read" in refused(Path("a\0b"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps", "has no ="),
        ("steps=3", "Did you mean train.steps"),
        ("=3", "names no section.key"),
        ("train.=3", "names no section.key"),
        ("trian.steps=3", "Did you mean the section train"),
        ("train.steps=[1", "not valid YAML"),
        ("train.steps.more=1", "train.steps"),
        ("run.seed=x", "run.seed='x'"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, says: str) -> None:
    assert says in refused(write(tmp_path, MODEL + "train: {steps: 3}"), override)
