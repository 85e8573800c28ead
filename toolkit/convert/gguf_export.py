"""`toolkit convert export CKPT OUT.gguf`: a checkpoint as the one file that llama.cpp runs, written
by the library `gguf`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolkit.arch.family import Part
from toolkit.arch.spec import WeightSpec
from toolkit.checkpoint.folders import checkpoint_in
from toolkit.checkpoint.manifest import verify_files
from toolkit.checkpoint.whole import WholeCheckpoint
from toolkit.config.schema import ModelSection
from toolkit.convert.architecture import foreign_config
from toolkit.convert.exporting import DTYPES, Exported, files_of, model_of
from toolkit.convert.transform import split, zeros
from toolkit.errors import CheckpointError, ConvertError, MachineError
from toolkit.files import Partial, sync_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

# llama.cpp's name of an architecture, by that of transformers' config.json; its `llama` is also Mistral's
NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens, gguf's TokenType


def export_gguf(
    ckpt: Path,
    out: Path,
    *,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Exported:
    """Write a checkpoint's weights and tokenizer to the new file OUT, one tensor in memory at a time.

    Arguments and errors are export_model()'s; a model that llama.cpp does not compute alike is
    refused too. Norms and biases are kept in fp32, as llama.cpp wants them.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MachineError(f"{out} cannot be written", why="the package gguf is not installed", fix="Install gguf (the extra `hf`).")
    import gguf

    if out.exists():
        raise ConvertError(f"{out} exists", why="an export never writes over anything", fix="Name a file that does not exist.")
    folder = checkpoint_in(ckpt)
    with WholeCheckpoint(folder) as whole:
        model, spec = model_of(whole.manifest, folder), model_of(whole.manifest, folder).spec
        form, config = foreign_config(model, dtype="float32")
        architecture = _architecture(model, form.model_type)
        precision = dtype or _stored(whole, spec.before[0].name)
        files, origin = files_of(folder, whole.manifest, tokenizer)
        written = spec.with_all_biases() if form.biased else spec
        names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), spec.layers)
        plan: list[tuple[WeightSpec, Part, str]] = []
        for weight in written.weights():
            for part in form.parts(weight):
                name = names.get_name(part.name, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise ConvertError(f"{part.name} has no name in llama.cpp's {architecture}", fix="Export a folder for transformers.")
                plan.append((weight, part, name))
        if problem := verify_files(folder, whole.manifest.files):
            raise CheckpointError(problem, fix="Restore the file, or export another checkpoint.")
        with _written(out), Partial(out) as partial:
            path = partial.folder / out.name
            writer = gguf.GGUFWriter(path, architecture)
            _describe(writer, model, config, name=folder.name)
            _add_tokenizer(writer, files, vocab=spec.vocab)
            total = 0
            for weight, part, name in plan:
                kind = _kind(weight, precision)
                shape = part.shape[::-1] if part.transposed else part.shape
                size = torch.Size(shape).numel() * DTYPES[kind].itemsize
                writer.add_tensor_info(name, shape, *_as_gguf(gguf, kind, size))
                total += size
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done, last, tensors = 0, "", {}
            for weight, part, _ in plan:
                if weight.name != last:
                    last, tensors = weight.name, _theirs(whole, weight, form.parts(weight), model, there=spec.has(weight.name))
                tensor = tensors[part.name]
                if architecture == "llama" and re.search(r"[qk]_proj\.", part.name):
                    tensor = _interleaved(tensor, heads=spec.heads if "q_proj" in part.name else spec.groups)
                array = _array(tensor.to(DTYPES[_kind(weight, precision)]))
                writer.write_tensor_data(array)
                done += array.nbytes
                progress(done, total)
            writer.close()
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.rename(out)
            sync_folder(out.parent)
    return Exported(total, 1, precision, origin)


@contextmanager
def _written(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        why = (e.strerror or str(e)).lower()
        raise ConvertError(f"{out} cannot be written", why=why, fix="Make room, or name a file that you may write to.") from None


def _architecture(m: ModelSection, model_type: str) -> str:
    """llama.cpp's name for it; ConvertError for what its format cannot say."""
    if model_type not in NAMES:
        raise ConvertError(f"a model of type {model_type} cannot be a GGUF file", fix=f"Those of type {', '.join(NAMES)} can.")
    for key, value, there in (
        ("model.sliding_window", m.sliding_window, m.sliding_window is not None and NAMES[model_type] == "llama"),
        ("model.rope_scaling", m.rope_scaling and m.rope_scaling.type, m.rope_scaling is not None),
        ("model.mlp_bias", True, m.mlp_bias and NAMES[model_type] == "llama"),
    ):
        if there:
            raise ConvertError(
                f"the model has {key}={str(value).lower()}",
                why="this export does not write it, and llama.cpp would compute another model",
                fix="Export a folder for transformers.",
            )
    return NAMES[model_type]


def _describe(writer: Any, m: ModelSection, config: Mapping[str, Any], *, name: str) -> None:
    """The model's shape, in gguf's keys."""
    spec = m.spec
    writer.add_name(name)
    writer.add_context_length(m.max_position_embeddings)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.ffn)
    writer.add_head_count(spec.heads)
    writer.add_vocab_size(spec.vocab)
    if spec.norm == "rms":
        writer.add_layer_norm_rms_eps(m.norm_eps)
    else:
        writer.add_layer_norm_eps(m.norm_eps)
    if spec.rotary:
        writer.add_head_count_kv(spec.groups)
        writer.add_rope_freq_base(float(m.rope_theta))
        writer.add_rope_dimension_count(spec.head_dim)
        writer.add_key_length(spec.head_dim)
        writer.add_value_length(spec.head_dim)


def _kind(weight: WeightSpec, precision: str) -> str:
    return precision if weight.group != "vector" else "fp32"


def _as_gguf(gguf: Any, kind: str, size: int) -> tuple[Any, ...]:
    """The last arguments of add_tensor_info(): a type of numpy's, which has no bf16, the bytes, and
    the type of gguf's.
    """
    import numpy as np

    numpy_types: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.float16}
    raw = {"fp32": gguf.GGMLQuantizationType.F32, "fp16": gguf.GGMLQuantizationType.F16, "bf16": gguf.GGMLQuantizationType.BF16}
    return np.dtype(numpy_types[kind]), size, raw[kind]


def _theirs(whole: WholeCheckpoint, weight: WeightSpec, parts: tuple[Part, ...], m: ModelSection, *, there: bool) -> dict[str, Tensor]:
    """A weight as the tensors that transformers has, in torch.nn.Linear's order of dimensions."""
    if not there:
        rows = zeros(parts, torch.float32)
    else:
        rows = split(weight, parts, whole.view(weight.name), m.spec)
    return {p.name: (r.whole().t() if p.transposed else r.whole()).contiguous() for p, r in zip(parts, rows, strict=True)}


def _interleaved(weight: Tensor, *, heads: int) -> Tensor:
    """Rows of queries or keys in the order in which llama.cpp's `llama` rotates them: pairs side by
    side, not halves of a head.
    """
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape).contiguous()


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _stored(whole: WholeCheckpoint, name: str) -> str:
    if not whole.manifest.weights_only:
        return str(whole.manifest.config["train"]["precision"])
    return next(n for n, d in DTYPES.items() if d == whole.dtype(name))


# -- the tokenizer --------------------------------------------------------------------------------------


def _add_tokenizer(writer: Any, files: Mapping[str, bytes], *, vocab: int) -> None:
    """tokenizer.json's byte-level BPE in gguf's keys; a model with another tokenizer has ids alone."""
    known = json.loads(files["tokenizer.json"]) if "tokenizer.json" in files else {}
    pre = pre_tokenizer_name(known)
    if pre is None:
        writer.add_tokenizer_model("no_vocab")
        return
    added = {t["content"]: t for t in known.get("added_tokens", ())}
    ids = {**known["model"]["vocab"], **{text: t["id"] for text, t in added.items()}}
    by_id = {i: text for text, i in ids.items() if i < vocab}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab)]
    kinds = [
        UNUSED if i not in by_id else NORMAL if text not in added else CONTROL if added[text].get("special") else USER_DEFINED
        for i, text in enumerate(tokens)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in known["model"]["merges"]])
    settings = _json(files, "tokenizer_config.json")
    for key, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        text = settings.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        if text in ids:
            add(ids[text])
    template = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else settings.get("chat_template")
    if isinstance(template, str):
        writer.add_chat_template(template)


def pre_tokenizer_name(known: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json splits text before BPE; None where it is no
    byte-level BPE, or splits in another way.
    """
    if (known.get("model") or {}).get("type") != "BPE":
        return None
    steps = known.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [s.get("type") for s in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    pattern = str(steps[0].get("pattern", {}).get("Regex", "")) if kinds == ["Split", "ByteLevel"] else ""
    if pattern.startswith("(?i:'s|'t|'re|'ve|'m|'ll|'d)|"):
        return "llama-bpe" if r"|\p{N}{1,3}|" in pattern else "qwen2" if r"|\p{N}|" in pattern else None
    return None


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        found = json.loads(files[name])
    except (KeyError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
