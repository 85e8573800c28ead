"""A checkpoint as whole tensors under global names, whatever layout saved it: only the bytes that
are asked for are read.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.arch.spec import ModelSpec
from toolkit.checkpoint.manifest import Manifest, read_manifest
from toolkit.checkpoint.names import GROUP_FILE, WEIGHTS_FILE, rank_file
from toolkit.config.schema import ModelSection
from toolkit.errors import CheckpointError
from toolkit.parallel.layout import Layout
from toolkit.tensors import DTYPES, mapped

MASTER = "master"
_TYPES = {text: dtype for dtype, text in DTYPES.items()}
_BUFFER = 1 << 22  # bytes read at a time where columns have to be picked out
MIN_DIRECT_READ_BYTES = 1 << 12  # a shorter row is read with its neighbours in one go, and picked out in memory
_OPEN_FILES = 64


class _Entry(NamedTuple):
    """A tensor in a file: dtype, shape, and its first byte counted from the start of the file."""

    dtype: torch.dtype
    shape: list[int]
    offset: int


class _Flat(NamedTuple):
    """Tensors of one length in one file, by key."""

    path: Path
    entries: dict[str, _Entry]


class _Piece(NamedTuple):
    """Elements start … start + count of a tensor-parallel rank's part: elements at … at + count of
    some flat tensors.
    """

    start: int
    size: int
    flat: int
    at: int


@dataclass
class _Header:
    path: Path
    entries: dict[str, _Entry]
    metadata: dict[str, str]


@dataclass
class Parameter:
    """One parameter as saved: whole shape, the cut over `tp` ranks, the flat tensors that have it,
    and where its pieces lie.

    Cut as toolkit.arch.spec.Cut says: along dim, in each of `blocks` equal parts by itself.
    Flattened, every rank's part is `rows` rows, and the whole has those rows `tp` times as wide:
    rank r's part of a row is its r-th piece. counted: its optimizer keeps the number of updates.
    """

    shape: list[int]
    dim: int | None
    blocks: int
    tp: int
    keys: dict[str, _Entry]
    pieces: list[list[_Piece]] = field(default_factory=list)
    counted: bool = False

    @property
    def rows(self) -> int:
        return 1 if self.dim is None else math.prod(self.shape[: self.dim]) * self.blocks

    @property
    def width(self) -> int:
        return math.prod(self.shape) // self.rows

    def shard_shape(self, tp: int) -> list[int]:
        """Shape of each rank's part when cut over `tp` ranks."""
        return [n // tp if i == self.dim else n for i, n in enumerate(self.shape)]


class WholeCheckpoint:
    """Any complete checkpoint of the toolkit, training state or weights only; CheckpointError where
    it is not one, naming the file.

    Opening reads the manifest and the headers. Files are not held to their checksums here:
    toolkit.checkpoint.manifest.verify_files does.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: Manifest = read_manifest(folder)
            self._flats: list[_Flat] = []
            names = [f.name for f in self.manifest.files]
            self._files = [_header(folder / n) for n in sorted(names) if GROUP_FILE.fullmatch(n) or WEIGHTS_FILE.fullmatch(n)]
            spec = model_spec(self.manifest)
            found = _in_model_order(self._whole_tensors(spec) if self.manifest.weights_only else self._partitions(), spec)
            self.numbers: dict[str, Any] = {} if self.manifest.weights_only else self._numbers(names)
        except (ValueError, KeyError, TypeError, IndexError) as e:
            raise CheckpointError(f"{folder} is no checkpoint that can be read", why=str(e), fix="Name a complete step-… folder.") from None
        except OSError as e:
            raise CheckpointError(f"{e.filename} cannot be read", why=(e.strerror or str(e)).lower(), fix="Restore the file.") from None
        self._parameters: dict[str, Parameter] = found
        self._open: OrderedDict[Path, int] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """Global names in model order: embeddings, layers by number, final norm, output layer."""
        return list(self._parameters)

    def parameter(self, name: str) -> Parameter:
        """How a parameter was saved; CheckpointError where there is none of that name."""
        try:
            return self._parameters[name]
        except KeyError:
            raise CheckpointError(f"{self.folder} holds no parameter {name}", fix="Use a checkpoint of the same model.") from None

    def shape(self, name: str) -> list[int]:
        """Whole shape."""
        return self.parameter(name).shape

    def dtype(self, name: str, key: str = MASTER) -> torch.dtype:
        """What a tensor is stored as."""
        return self.parameter(name).keys[key].dtype

    def keys(self, name: str) -> tuple[str, ...]:
        """ "master" and the optimizer's states as saved (none in a weights-only checkpoint)."""
        return tuple(self.parameter(name).keys)

    def read(self, name: str, key: str = MASTER) -> Tensor:
        """A whole tensor in its stored dtype."""
        p = self.parameter(name)
        out = torch.empty(math.prod(p.shape), dtype=p.keys[key].dtype)
        self.read_into(out, name, key)
        return out.view(p.shape)

    def view(self, name: str, key: str = MASTER) -> Tensor:
        """A whole tensor to look at: a mapping of the file where it lies there in one piece, else read."""
        p = self.parameter(name)
        if p.tp > 1 or len(p.pieces[0]) != 1:
            return self.read(name, key)
        (piece,) = p.pieces[0]
        flat, dtype = self._flats[piece.flat], p.keys[key].dtype
        try:
            return mapped(flat.path, dtype=dtype, shape=p.shape, offset=flat.entries[key].offset + piece.at * dtype.itemsize)
        except OSError as e:
            raise CheckpointError(f"{flat.path} cannot be read", why=(e.strerror or str(e)).lower(), fix="Restore the file.") from None

    def read_into(self, out: Tensor, name: str, key: str = MASTER, *, tp: int = 1, rank: int = 0, start: int = 0) -> None:
        """Fill a flat tensor (stored dtype, on the CPU) with elements start … start + len(out) of
        TP rank `rank`'s part, cut over `tp`.
        """
        p = self.parameter(name)
        if p.dim is None:
            tp, rank = 1, 0
        if p.width % tp:
            raise CheckpointError(
                f"{name} with shape {p.shape} cannot be cut over {tp} tensor-parallel ranks", fix="Set another parallel.tp."
            )
        here, there = p.width // tp, p.width // p.tp  # columns of a part: asked for, and saved
        first = rank * here
        for row, rows, low, high, at in _rectangles(start, start + out.numel(), here):
            block = out[at : at + rows * (high - low)].view(rows, high - low)
            for r in range((first + low) // there, -(-(first + high) // there)):
                left, right = max(first + low, r * there), min(first + high, (r + 1) * there)
                columns = block[:, left - first - low : right - first - low]
                self._read_block(columns, p, key, r, row=row, column=left - r * there, width=there)

    def close(self) -> None:
        """Let go of the files; reading opens them again."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __enter__(self) -> WholeCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading --------------------------------------------------------------------------------------

    def _read_block(self, out: Tensor, p: Parameter, key: str, rank: int, *, row: int, column: int, width: int) -> None:
        """Columns column … column + out.shape[1] of rows row … row + out.shape[0] of a saved part."""
        rows, columns = out.shape
        at = row * width + column
        if (columns == width or rows == 1) and out.is_contiguous():
            self._read_flat(out.view(-1), p, key, rank, at)
        elif columns < width and columns * out.element_size() >= MIN_DIRECT_READ_BYTES:
            for i in range(rows):
                self._read_flat(out[i], p, key, rank, at + i * width)
        else:
            step = max(1, _BUFFER // (width * out.element_size()))
            buffer = torch.empty(step * width, dtype=out.dtype)
            for i in range(0, rows, step):
                n = min(step, rows - i)
                self._read_flat(buffer[: (n - 1) * width + columns], p, key, rank, at + i * width)
                out[i : i + n].copy_(buffer.as_strided((n, columns), (width, 1)))

    def _read_flat(self, out: Tensor, p: Parameter, key: str, rank: int, start: int) -> None:
        """A run of a saved part, from as many pieces as it takes."""
        pieces = p.pieces[rank]
        target = out.view(torch.uint8).numpy().data
        size, done = out.element_size(), 0
        i = bisect_right(pieces, start, key=lambda piece: piece.start) - 1
        while done < out.numel():
            piece = pieces[i]
            skip = start + done - piece.start
            n = min(piece.size - skip, out.numel() - done)
            flat = self._flats[piece.flat]
            self._pread(flat.path, target[done * size : (done + n) * size], flat.entries[key].offset + (piece.at + skip) * size)
            done, i = done + n, i + 1

    def _pread(self, path: Path, target: memoryview, offset: int) -> None:
        try:
            descriptor = self._open.pop(path) if path in self._open else os.open(path, os.O_RDONLY)
            self._open[path] = descriptor
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            while len(target):
                n = os.preadv(descriptor, [target], offset)
                if not n:
                    raise CheckpointError(f"{path} ends too early", fix="Restore the file, or use another checkpoint.")
                target, offset = target[n:], offset + n
        except OSError as e:
            raise CheckpointError(f"{path} cannot be read", why=(e.strerror or str(e)).lower(), fix="Restore the file.") from None

    # -- headers ----------------------------------------------------------------------------------------

    def _whole_tensors(self, spec: ModelSpec) -> dict[str, Parameter]:
        found = {}
        for header in self._files:
            for name, entry in header.entries.items():
                piece, cut = _Piece(0, math.prod(entry.shape), len(self._flats), 0), spec.weight(name).cut
                self._flats.append(_Flat(header.path, {MASTER: entry}))
                found[name] = Parameter(entry.shape, cut.dim, cut.blocks, 1, {MASTER: entry}, [[piece]])
        return found

    def _partitions(self) -> dict[str, Parameter]:
        layout = layout_of_manifest(self.manifest)
        found: dict[str, Parameter] = {}
        stage_of: dict[str, int] = {}
        for header in sorted(self._files, key=lambda h: _sort_key(h.path, layout)):
            at = layout.coordinates(int(GROUP_FILE.fullmatch(header.path.name)[1]))  # type: ignore[index]
            parameters = json.loads(header.metadata["parameters"])
            flat = {k: e for k, e in header.entries.items() if e.shape == header.entries[MASTER].shape}
            self._flats.append(_Flat(header.path, flat))
            counted = "step" in header.entries or "step" in json.loads(header.metadata["numbers"])
            for name, start, offset, count in json.loads(header.metadata["fragments"]):
                cut = parameters[name]
                whole = list(cut["shape"])
                tp = layout.tp if cut["dim"] is not None else 1
                if cut["dim"] is not None:
                    whole[cut["dim"]] *= layout.tp
                p = found.setdefault(name, Parameter(whole, cut["dim"], cut["blocks"], tp, flat, [[] for _ in range(tp)], counted))
                # a tied weight is on two stages, a parameter that is not cut on every TP rank: the
                # first one's will do
                if stage_of.setdefault(name, at.pp) != at.pp or at.tp >= tp:
                    continue
                if p.shape != whole or {k: e.dtype for k, e in flat.items()} != {k: e.dtype for k, e in p.keys.items()}:
                    raise ValueError(f"{header.path} has another shape or other states of {name} than the files before it")
                p.pieces[at.tp].append(_Piece(start, count, len(self._flats) - 1, offset))
        for name, p in found.items():
            for rank, pieces in enumerate(p.pieces):
                pieces.sort()
                end = 0
                for piece in pieces:
                    if piece.start != end:
                        raise ValueError(
                            f"{name} is not whole: elements from {end} of tensor-parallel rank {rank} are missing or there twice"
                        )
                    end += piece.size
                if end != math.prod(p.shard_shape(p.tp)):
                    raise ValueError(f"{name} is not whole: elements from {end} of tensor-parallel rank {rank} are missing")
        return found

    def _numbers(self, names: Iterable[str]) -> dict[str, Any]:
        """counters, loss_scaler: as EngineState.numbers(); step: the optimizer's count of its
        updates, None where it has none.
        """
        path = self.folder / rank_file(0)
        if path.name not in names:
            raise ValueError(f"{path} is missing")
        steps = set()
        for header in self._files:
            if entry := header.entries.get("step"):
                with header.path.open("rb") as f:
                    f.seek(entry.offset)
                    raw = bytearray(f.read(entry.dtype.itemsize))
                steps.add(int(torch.frombuffer(raw, dtype=entry.dtype)))
            elif "step" in (numbers := json.loads(header.metadata["numbers"])):
                steps.add(int(numbers["step"]))
        if len(steps) > 1:
            raise ValueError(f"its optimizer groups have taken different numbers of steps: {sorted(steps)}")
        state = json.loads(_header(path).metadata["numbers"])
        return {"step": next(iter(steps), None), **state}


def model_spec(manifest: Manifest) -> ModelSpec:
    """What the model of a checkpoint is; a key that its version did not know yet has its usual value."""
    return ModelSection.model_validate(manifest.config["model"]).spec


def _in_model_order(found: Mapping[str, Parameter], spec: ModelSpec) -> dict[str, Parameter]:
    """The same in the order of the model's modules; ValueError for a name that the model does not have."""
    ordered = {w.name: found[w.name] for w in spec.weights() if w.name in found}
    if unknown := found.keys() - ordered.keys():
        raise ValueError(f"its model has no parameter {min(unknown)}")
    return ordered


def layout_of_manifest(manifest: Manifest) -> Layout:
    """The degrees a checkpoint was saved with."""
    of = manifest.layout
    return Layout(tp=of["parallel.tp"], pp=of["parallel.pp"], vpp=of["parallel.vpp"], cp=of["parallel.cp"], dp=of["dp"])


def _rectangles(start: int, end: int, width: int) -> Iterator[tuple[int, int, int, int, int]]:
    """A run of a matrix's elements as up to three blocks: first row, number of rows, first and last
    + 1 column, place in the run.
    """
    at = start
    while at < end:
        row, column = divmod(at, width)
        rows = 1 if column or end - at < width else (end - at) // width
        high = min(width, column + end - at)
        yield row, rows, column, high, at - start
        at += rows * (high - column)


def _sort_key(path: Path, layout: Layout) -> tuple[int, int, int]:
    """Stage by stage and group by group, so that names appear in model order within each group."""
    match = GROUP_FILE.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} does not belong to a checkpoint with optimizer states")
    rank = int(match[1])
    return layout.coordinates(rank).pp, int(match[2]), rank


def _header(path: Path) -> _Header:
    """The header of a safetensors file, held to the file's size; ValueError names the file."""
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{path} is damaged: its header is longer than the file")
        try:
            raw = json.loads(f.read(length))
            metadata = raw.pop("__metadata__", {})
            entries = {}
            for name, one in raw.items():
                dtype, (first, last) = _TYPES[one["dtype"]], one["data_offsets"]
                if last - first != math.prod(one["shape"]) * dtype.itemsize or first < 0 or 8 + length + last > size:
                    raise ValueError(name)
                entries[name] = _Entry(dtype, list(one["shape"]), 8 + length + first)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path} is damaged: its header does not describe it ({e})") from None
    return _Header(path, entries, metadata)
