"""`toolkit convert import`: a foreign model becomes a weights-only checkpoint, one tensor in memory
at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toolkit.arch.family import Part
from toolkit.arch.spec import WeightSpec
from toolkit.checkpoint.weights import WeightsWriter, weights_manifest
from toolkit.config.load import parse_config
from toolkit.config.schema import ModelSection, RunConfig
from toolkit.config.yaml_text import write_yaml
from toolkit.convert.architecture import model_section
from toolkit.convert.source import Source, open_source, some, tokenizer_size
from toolkit.convert.transform import IGNORED, join
from toolkit.errors import ConfigError, ConvertError
from toolkit.parallel.rules import Machine, violations
from toolkit.tensors import Rows

Plan = list[tuple[WeightSpec, tuple[Part, ...]]]
"""Every weight to be made, and the tensors that make it."""

CONFIG = "config.yaml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_UNKNOWN = "./the-tokenizer-of-this-model"  # refused as missing: any other would train it on ids that mean something else
_GPT2_IDS = range(50257, 50305)  # GPT-2's tokenizer, as nanoGPT uses it, and rounded up


@dataclass(frozen=True)
class Imported:
    """What an import wrote. config: the run's YAML; bytes: of weights; tokenizer: data.tokenizer in
    it, None where there was none.
    """

    config: Path
    bytes: int
    parameters: int
    dtype: str
    tokenizer: str | None


def import_model(
    src: Path,
    out: Path,
    *,
    dtype: str | None = None,
    tokenizer: bool = True,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Imported:
    """Write SRC's model to the new folder OUT: weights, config.yaml to train with, tokenizer and
    generation settings.

    dtype: fp32, bf16 or fp16 for all tensors; None: each as it is stored. tokenizer: whether its
    files go along. progress: called with
    bytes done and in all. Memory: two tensors, and half a GiB being written. Raises ConvertError or
    CheckpointError; OUT is then as before.
    """
    if out.exists():
        raise ConvertError(f"{out} exists", why="an import never writes over anything", fix="Name a folder that does not exist.")
    source = open_source(src)
    model = section_of(source)
    spec = model.spec
    plan = [(weight, source.form.parts(weight)) for weight in spec.weights()]
    check_tensors(source, model, plan)
    files = {k: v for k, v in source.files.items() if tokenizer or k in ("config.json", "generation_config.json")}
    if model.vocab_size and (size := tokenizer_size(files.get("tokenizer.json", b""))) > model.vocab_size:
        raise ConvertError(
            f"the tokenizer of {source.where} has {size:,} ids, and the model {model.vocab_size:,}",
            why="text could have ids that the model has no row for",
            fix="Set --no-tokenizer to leave it out, and give data.tokenizer one that fits.",
        )
    precision = dtype or stored_precision(source, plan)
    tokenizer_spec = _tokenizer(source, files, model)
    raw = _run(model, out, precision=precision, tokenizer=tokenizer_spec)
    here = {"data": {"tokenizer": str(out / tokenizer_spec)}} if tokenizer_spec in ("tokenizer.json", ".") else {}
    config = parse_config({**raw, **here, "checkpoint": {"init_from": str(out)}})  # for readers elsewhere: the file's are relative to it
    # what training starts from need not be what the weights are stored as
    manifest = weights_manifest(config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})}))
    total = sum(_bytes(source, weight, parts, dtype) for weight, parts in plan)
    done = 0
    with WeightsWriter(out, manifest) as writer:
        for weight, parts in plan:
            rows = join(weight, parts, [source.tensors.read(p.name) for p in parts], spec)
            if dtype is not None:
                rows = Rows([piece.to(DTYPES[dtype]) for piece in rows.pieces])
            writer.add(weight.name, rows)
            done += rows.nbytes
            progress(done, total)
            del rows
        for name, data in files.items():
            writer.add_file(name, data)
        writer.add_file(CONFIG, _text(raw, source, config).encode())
    return Imported(out / CONFIG, done, spec.unpadded_parameters, precision, tokenizer_spec)


def section_of(source: Source) -> ModelSection:
    """What a source's model is; ConvertError where it is none that can be computed here."""
    section = model_section(source.form, source.config, where=source.where)
    try:
        model = parse_config({"model": section}).model
    except ConfigError as e:
        raise ConvertError(f"{source.where} has sizes that make no model: {e.what}", why=e.why, fix=e.fix) from None
    if model.num_attention_heads % (model.num_query_groups or 1):
        raise ConvertError(
            f"{source.where} has {model.num_attention_heads} query heads for {model.num_query_groups} key/value heads",
            why="each of these serves the same number of those",
            fix="Correct its config.json.",
        )
    return model


def check_tensors(source: Source, model: ModelSection, plan: Plan) -> None:
    """Exactly the tensors that the config asks for, each of its shape and of a dtype that weights have."""
    wanted = {p.name: list(p.shape) for _, parts in plan for p in parts}
    there = set(source.tensors.names)
    if missing := [n for n in wanted if n not in there]:
        raise ConvertError(
            f"{source.where} lacks {len(missing)} of {len(wanted)} tensors: {some(missing)}",
            why="its config asks for them",
            fix="Get the whole model, or the config.json that belongs to it.",
        )
    tied_copy = {"lm_head.weight"} if model.tie_embeddings else set()
    extra = [n for n in source.tensors.names if n not in wanted and n not in tied_copy and not n.endswith(IGNORED)]
    if extra:
        raise ConvertError(
            f"{source.where} holds {len(extra)} tensors that its config does not ask for: {some(extra)}",
            why="leaving them out would make another model of it",
            fix="Get the config.json that belongs to the weights.",
        )
    for name, shape in wanted.items():
        if source.tensors.shape(name) != shape:
            raise ConvertError(
                f"{source.where} holds {name} with shape {source.tensors.shape(name)}, and its config makes it {shape}",
                fix="Get the config.json that belongs to the weights.",
            )
        if source.tensors.dtype(name) not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ConvertError(
                f"{source.where} holds {name} as {str(source.tensors.dtype(name)).removeprefix('torch.')}",
                why="weights to train are floating-point numbers",
                fix="Import the model that it was made from.",
            )


def stored_precision(source: Source, plan: Plan) -> str:
    """The precision that most weights are stored in."""
    names = {d: n for n, d in DTYPES.items()}
    sizes: dict[str, int] = {}
    for p in (p for _, parts in plan for p in parts):
        kind = names.get(source.tensors.dtype(p.name), "fp32")
        sizes[kind] = sizes.get(kind, 0) + math.prod(source.tensors.shape(p.name))
    return max(sizes, key=lambda k: sizes[k])


def _bytes(source: Source, weight: WeightSpec, parts: Sequence[Part], dtype: str | None) -> int:
    kind = source.tensors.dtype(parts[0].name) if dtype is None else DTYPES[dtype]
    return weight.count * kind.itemsize


def _tokenizer(source: Source, files: Mapping[str, bytes], model: ModelSection) -> str | None:
    """What data.tokenizer should be, as far as SRC tells."""
    if "tokenizer.json" in files:
        return "tokenizer.json"  # beside the config that names it
    if {"tokenizer.model", "vocab.json"} & files.keys():
        return "."
    if source.form.name == "nanogpt" and model.vocab_size in _GPT2_IDS:
        return "openai-community/gpt2"
    return None


def _run(model: ModelSection, out: Path, *, precision: str, tokenizer: str | None) -> dict[str, Any]:
    """A run that goes on training the model: every key of its shape, and the few others that a
    person will look at first.
    """
    shape = {k: v for k, v in model.model_dump(mode="json").items() if v is not None and k != "compile"}
    return {
        "run": {"dir": f"runs/{out.name}"},
        "model": shape,
        "train": {
            "steps": 100,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "seq_length": min(model.max_position_embeddings, 2048),
            "precision": "fp32" if precision == "fp32" else "bf16",
        },
        "optimizer": {"lr": 2e-5, "warmup_steps": 10},
        "data": {"tokenizer": tokenizer or _UNKNOWN},
        "checkpoint": {"init_from": ".", "every": 100},  # the folder of this config; without a save there is nothing to export
    }


def _on_two_ranks(config: RunConfig) -> str:
    """What to set so that the run is legal on two processes: a cut of the model where one can be
    made, else nothing, for two copies.
    """
    for option in ({"tp": 2}, {"pp": 2}):
        cut = config.model_copy(update={"parallel": config.parallel.model_copy(update=option)})
        if not violations(cut, 2, machine=Machine(cuda=True)):
            return "".join(f" parallel.{key}={value}" for key, value in option.items())
    return ""


def _text(run: Mapping[str, Any], source: Source, config: RunConfig) -> str:
    lines = [
        f"# Imported from {source.where}. Start from these weights with a fresh optimizer:",
        f"#   toolkit train THIS_FILE data.source=PATH{_on_two_ranks(config)} --num-procs 2",
    ]
    if run["data"]["tokenizer"] == _UNKNOWN:
        lines.append("# The model came without a tokenizer: set data.tokenizer to the one it was trained with.")
    return "\n".join(lines) + "\n" + write_yaml(dict(run))
