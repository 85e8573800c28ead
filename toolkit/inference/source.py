"""What CKPT may be: a checkpoint of the toolkit in any layout, an imported model, a Hugging Face
folder, a GGUF file, nanoGPT's ckpt.pt.

model = open_model(path)
model.section                      # what it is, in the words of the config
with model.weights(spec) as read:  # read(weight, tp=2, rank=0) is one rank's part
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from toolkit.arch.spec import ModelSpec, WeightSpec
from toolkit.checkpoint.folders import checkpoint_in
from toolkit.checkpoint.manifest import NAME, Manifest, read_manifest
from toolkit.config.schema import ModelSection
from toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.convert.source import Source


class Read(Protocol):
    """Gives one tensor-parallel rank's part of a weight, in memory of its own."""

    def __call__(self, weight: WeightSpec, *, tp: int, rank: int) -> Tensor: ...


@dataclass(frozen=True)
class Model:
    """A model to generate with. precision: its weights are stored in it, or were trained in it;
    foreign: its tokenizer decides which special tokens a prompt starts with, as it does elsewhere;
    files: tokenizer and generation settings by name; tokenizer: what data.tokenizer says in the
    config of the run that trained it; config: that run's, whole; by_part: weights can be read one
    by one;
    cuts: a rank reads its own part of a weight alone, not the whole one.
    """

    path: Path
    section: ModelSection
    precision: str
    foreign: bool
    files: Mapping[str, bytes]
    tokenizer: str | None
    weights: Callable[[ModelSpec], Any]
    config: Mapping[str, Any] | None = None
    by_part: bool = True
    cuts: bool = True


def open_model(path: Path) -> Model:
    """Find out what CKPT is. torch is imported only where the format needs it. Raises
    CheckpointError or ConvertError.
    """
    path = path.expanduser()
    if path.is_dir() and not _is_ours(path) and any((path / n).is_file() for n in ("config.json", "ckpt.pt")):
        return _foreign(path)
    if path.is_file() or (path.is_dir() and not _is_ours(path) and next(path.glob("*.gguf"), None)):
        return _foreign(path)
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist",
            fix="Name a run, a step-… folder, an imported model, a Hugging Face folder, a .gguf file or nanoGPT's ckpt.pt.",
        )
    folder = checkpoint_in(path)
    try:
        manifest = read_manifest(folder)
        section = ModelSection.model_validate(manifest.config["model"])
    except (ValueError, KeyError) as e:
        raise CheckpointError(f"{folder} cannot be used: {e}", fix="Name another checkpoint.") from None
    missing = [f.name for f in manifest.files if not (folder / f.name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of its {len(manifest.files)} files: {', '.join(missing[:3])}",
            why="its manifest lists them",
            fix="Copy the whole folder again, or name another checkpoint.",
        )
    files, tokenizer = _carried(folder, manifest)
    return Model(
        path=folder,
        section=section,
        precision=str(manifest.config["train"]["precision"]),
        foreign=manifest.weights_only,
        files=files,
        tokenizer=tokenizer,
        weights=lambda _spec: _from_checkpoint(folder),
        config=manifest.config,
    )


def _is_ours(path: Path) -> bool:
    return (path / NAME).exists() or (path / "checkpoints").is_dir() or next(path.glob("step-*"), None) is not None


def _carried(folder: Path, manifest: Manifest) -> tuple[dict[str, bytes], str | None]:
    """Files of the checkpoint itself, else of what its run started from; and the data.tokenizer of
    its config.
    """
    from toolkit.convert.carried import carried_files

    files: dict[str, bytes] = {}
    init_from = manifest.config.get("checkpoint", {}).get("init_from")
    for place in (Path(str(init_from)).expanduser() if init_from else None, folder):
        if place is not None and place.is_dir():
            files |= carried_files(place)
    return files, manifest.config.get("data", {}).get("tokenizer")


@contextmanager
def _from_checkpoint(folder: Path) -> Iterator[Read]:
    import torch

    from toolkit.checkpoint.whole import WholeCheckpoint

    with WholeCheckpoint(folder) as whole:

        def read(weight: WeightSpec, *, tp: int, rank: int) -> Tensor:
            out = torch.empty(weight.cut.part(weight.shape, tp), dtype=whole.dtype(weight.name))
            whole.read_into(out.view(-1), weight.name, tp=tp, rank=rank)
            return out

        yield read


def _foreign(path: Path) -> Model:
    from toolkit.convert.importing import check_tensors, section_of, stored_precision
    from toolkit.convert.source import Held, Pickled, open_source

    source = open_source(path)
    section = section_of(source)
    plan = [(weight, source.form.parts(weight)) for weight in section.spec.weights()]
    check_tensors(source, section, plan)
    return Model(
        path=path,
        section=section,
        precision=stored_precision(source, plan),
        foreign=True,
        files=source.files,
        tokenizer=None,
        weights=lambda spec: _from_source(source, spec),
        cuts=False,
        by_part=not isinstance(source.tensors, Held) or isinstance(source.tensors, Pickled),
    )


@contextmanager
def _from_source(source: Source, spec: ModelSpec) -> Iterator[Read]:
    from toolkit.convert.transform import join
    from toolkit.model.init import cut_out

    def read(weight: WeightSpec, *, tp: int, rank: int) -> Tensor:
        parts = source.form.parts(weight)
        rows = join(weight, parts, [source.tensors.read(p.name) for p in parts], spec)
        whole = rows.whole()
        part = cut_out(weight.cut, whole, tp=tp, rank=rank)
        return part.clone() if len(rows.pieces) == 1 or part is not whole else part

    yield read
