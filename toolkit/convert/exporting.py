"""`toolkit convert export`: any complete checkpoint becomes a folder that transformers loads, one
tensor in memory at a time.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toolkit.arch.family import Format
from toolkit.arch.spec import TIED_NAME, ModelSpec, WeightSpec
from toolkit.checkpoint.folders import checkpoint_in
from toolkit.checkpoint.manifest import Manifest, verify_files
from toolkit.checkpoint.whole import WholeCheckpoint
from toolkit.config.load import override_config
from toolkit.config.schema import ModelSection
from toolkit.convert.architecture import foreign_config
from toolkit.convert.carried import carried_files
from toolkit.convert.stream import Job, Slot, shards, write_all
from toolkit.convert.transform import split, zeros
from toolkit.data.dataset import tokenizer_file
from toolkit.errors import CheckpointError, ConfigError, ConvertError
from toolkit.files import Partial, write_durably
from toolkit.tensors import Rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "pretraining_tp")  # of the config.json a model came with
SHARD_GB = 5.0


@dataclass(frozen=True)
class Exported:
    """What an export wrote: bytes of weights, files they are in, and where the tokenizer came from
    (None: there is none).
    """

    bytes: int
    files: int
    dtype: str
    tokenizer: Path | None


def export_model(
    ckpt: Path,
    out: Path,
    *,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    shard_gb: float = SHARD_GB,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Exported:
    """Write a checkpoint's weights to the new folder OUT as Hugging Face has them.

    ckpt: an imported folder, a step-… folder, or a run (its newest complete checkpoint), of any
    layout. dtype: fp32, bf16 or fp16; None: as stored, or for a training checkpoint as trained.
    tokenizer: a folder or tokenizer.json to carry along; None: the checkpoint's own, or its data's.
    Every file is held to its checksum while it is converted. Raises ConvertError or
    CheckpointError; OUT is then as before.
    """
    if out.exists():
        raise ConvertError(f"{out} exists", why="an export never writes over anything", fix="Name a folder that does not exist.")
    folder = checkpoint_in(ckpt)
    with _Readers(folder) as readers:
        whole = readers.mine()
        model = model_of(whole.manifest, folder)
        weights_only = whole.manifest.weights_only
        precision = dtype or (None if weights_only else str(whole.manifest.config["train"]["precision"]))
        kind = None if precision is None else DTYPES[precision]
        said = precision or _name(_most(whole))
        form, config = foreign_config(model, dtype={"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(said, said))
        spec = model.spec
        written = spec.with_all_biases() if form.biased else spec
        jobs = [_job(weight, form, readers, spec, kind) for weight in written.weights()]
        files, origin = files_of(folder, whole.manifest, tokenizer)
        config |= _kept(files)
        try:
            with Partial(out) as partial:
                count = _write(partial.folder, jobs, whole, config, files, shard_gb, progress)
                partial.publish()
        except OSError as e:
            reason = e.strerror or str(e)
            raise ConvertError(
                f"{out} cannot be written", why=reason[:1].lower() + reason[1:], fix="Make room, or name a folder that you may write to."
            ) from None
    return Exported(sum(j.total for j in jobs), count, said, origin)


def model_of(manifest: Manifest, folder: Path) -> ModelSection:
    """The model section a checkpoint was saved with."""
    try:
        return ModelSection.model_validate(manifest.config["model"])
    except (KeyError, ValueError) as e:
        raise CheckpointError(
            f"{folder} names no model that this version knows", why=str(e), fix="Use the version it was saved with."
        ) from None


class _Readers:
    """A reader of the checkpoint for each thread: one keeps files open that another may close."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.local, self.all = folder, threading.local(), list[WholeCheckpoint]()

    def mine(self) -> WholeCheckpoint:
        if not hasattr(self.local, "whole"):
            self.local.whole = WholeCheckpoint(self.folder)
            self.all.append(self.local.whole)
        return self.local.whole

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.all:
            one.close()


def _job(weight: WeightSpec, form: Format, readers: _Readers, model: ModelSpec, dtype: torch.dtype | None) -> Job:
    name, whole, parts = weight.name, readers.mine(), form.parts(weight)
    there = model.has(name)
    stored = whole.dtype(name if there else TIED_NAME)
    kind = dtype or stored
    if there and whole.shape(name) != list(weight.shape):
        raise CheckpointError(
            f"{whole.folder} holds {name} with shape {whole.shape(name)}, and its own config makes it {list(weight.shape)}",
            fix="The checkpoint is damaged: use another one.",
        )

    def make() -> list[Rows]:
        if not there:
            return zeros(parts, kind)
        return split(weight, parts, readers.mine().view(name).to(kind), model)

    slots = [Slot(p.name, kind, list(p.shape)) for p in parts]
    return Job(slots, make, needs=weight.count * (stored.itemsize + kind.itemsize))


def _write(
    partial: Path,
    jobs: list[Job],
    whole: WholeCheckpoint,
    config: dict[str, Any],
    files: dict[str, bytes],
    shard_gb: float,
    progress: Callable[[int, int], None],
) -> int:
    count = shards(jobs, limit=int(shard_gb * 1e9))
    names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    total, done = sum(j.total for j in jobs), 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    records = whole.manifest.files
    with ThreadPoolExecutor(1, thread_name_prefix="verify") as pool:
        # beside the conversion: nothing counts before its outcome is known
        good: Future[str] = pool.submit(verify_files, whole.folder, records)
        write_all([partial / n for n in names], jobs, progress=advance)
        if problem := good.result():
            raise CheckpointError(problem, fix="Restore the file, or export another checkpoint.")
    if count > 1:
        weight_map = {s.name: names[s.file] for j in jobs for s in j.slots}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_durably(partial / "model.safetensors.index.json", json.dumps(index, indent=2).encode())
    for name, data in files.items():
        write_durably(partial / name, data)
    write_durably(partial / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    return count


def files_of(folder: Path, manifest: Manifest, tokenizer: Path | None) -> tuple[dict[str, bytes], Path | None]:
    """What goes along: of the folder asked for, else of the checkpoint, of data.tokenizer, of the
    prepared data, of what the run started from.
    """
    if tokenizer is not None:
        found = _tokenizer_files(tokenizer)
        if not _has_tokenizer(found):
            raise ConvertError(f"--tokenizer {tokenizer} holds no tokenizer", fix="Name a folder with tokenizer.json, or the file.")
        return carried_files(folder) | _described(found), tokenizer
    named = [
        manifest.config.get("data", {}).get("tokenizer"),
        _beside_the_data(manifest),
        manifest.config.get("checkpoint", {}).get("init_from"),
    ]
    candidates = [folder, *(Path(str(n)).expanduser() for n in named if n)]
    settings: dict[str, bytes] = {}
    for place in reversed(candidates):  # the first of them has the last word
        settings |= {k: v for k, v in _tokenizer_files(place).items() if k in ("config.json", "generation_config.json")}
    for place in candidates:
        if _has_tokenizer(found := _tokenizer_files(place)):
            return settings | _described(found), place
    return settings, None


def _beside_the_data(manifest: Manifest) -> Path | None:
    known = manifest.identity.get("data.tokenizer")
    try:
        return tokenizer_file(override_config(manifest.config, []), tokenizer_hash=str(known)) if known else None
    except ConfigError:  # of another version
        return None


def _tokenizer_files(place: Path) -> dict[str, bytes]:
    if place.is_file():
        found = carried_files(place.parent) if place.name == "tokenizer.json" else {}
        found["tokenizer.json"] = place.read_bytes()
        return found
    return carried_files(place) if place.is_dir() else {}


def _described(files: dict[str, bytes]) -> dict[str, bytes]:
    """With the file by which transformers knows what to load, where there is only a tokenizer.json."""
    if "tokenizer.json" not in files or "tokenizer_config.json" in files:
        return files
    return files | {"tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n'}


def _has_tokenizer(files: dict[str, bytes]) -> bool:
    return bool({"tokenizer.json", "tokenizer.model", "vocab.json"} & files.keys())


def _kept(files: dict[str, bytes]) -> dict[str, Any]:
    """Ids of special tokens and the like, which say nothing of the weights, from the config.json
    that came along.
    """
    text = files.pop("config.json", None)
    if text is None:
        return {}
    try:
        old = json.loads(text)
    except ValueError:
        return {}
    return {k: old[k] for k in _KEPT if k in old} if isinstance(old, dict) else {}


def _most(whole: WholeCheckpoint) -> torch.dtype:
    return whole.dtype(TIED_NAME)


def _name(dtype: torch.dtype) -> str:
    return next((n for n, d in DTYPES.items() if d == dtype), str(dtype).removeprefix("torch."))
