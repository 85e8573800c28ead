"""Where a model is imported from: tensors by name, read one at a time, and the files that go with them."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import json
import mmap
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from toolkit.arch.families import FORMATS
from toolkit.arch.family import Format
from toolkit.convert.architecture import format_of
from toolkit.convert.carried import carried_files
from toolkit.errors import ConvertError
from toolkit.tensors import DTYPES, mapped

_TYPES = {text: dtype for dtype, text in DTYPES.items()}
GGUF_PACKAGES = ("transformers", "gguf", "accelerate")  # the extra `hf`
_AGAIN = "Download or copy it again."


class Tensors:
    """Tensors by name. shape and dtype cost nothing; read() takes the memory of one tensor."""

    def shape(self, name: str) -> list[int]:
        raise NotImplementedError

    def dtype(self, name: str) -> torch.dtype:
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        raise NotImplementedError

    @property
    def names(self) -> list[str]:
        raise NotImplementedError


@dataclass(frozen=True)
class Source:
    """A model to import. config: config.json's or model_args' values; form: how its weights are
    kept; files: carried along by name.
    """

    where: str
    form: Format
    config: Mapping[str, Any]
    tensors: Tensors
    files: Mapping[str, bytes] = field(default_factory=dict)


def open_source(path: Path) -> Source:
    """Look at what SRC is: a Hugging Face folder, a GGUF file, or nanoGPT's ckpt.pt; ConvertError
    where it is none of them.
    """
    if not path.exists():
        raise ConvertError(f"{path} does not exist", fix="Name a folder with config.json and weights, a .gguf file, or nanoGPT's ckpt.pt.")
    if path.is_file():
        if path.suffix == ".gguf":
            return _gguf(path)
        if path.suffix in (".pt", ".pth"):
            return _nanogpt(path)
        raise ConvertError(f"{path} is a file", why="its config.json lies beside it", fix=f"Name its folder ({path.parent}).")
    if (path / "config.json").is_file():
        return _folder(path)
    if (path / "ckpt.pt").is_file():
        return _nanogpt(path / "ckpt.pt")
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _gguf(ggufs[0])
    if ggufs:
        raise ConvertError(f"{path} holds {len(ggufs)} GGUF files", fix=f"Name one of them, for example {ggufs[0]}.")
    raise ConvertError(
        f"{path} holds no config.json",
        why="that says what the weights are of",
        fix="Name the folder that transformers loads the model from.",
    )


def _folder(path: Path) -> Source:
    config = read_json(path / "config.json")
    form = format_of(config, where=str(path / "config.json"))
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise ConvertError(
            f"{path / 'config.json'} names weights quantised by {method}",
            why="training needs them as numbers",
            fix="Import the model that it was made from.",
        )
    tensors = _weights(path)
    return Source(str(path), form, config, _Prefixed.where_needed(tensors, form), carried_files(path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; ConvertError names the file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise ConvertError(f"{path} cannot be read", why=(e.strerror or str(e)).lower(), fix="Check its permissions.") from None
    except ValueError as e:
        raise ConvertError(f"{path} is not JSON", why=str(e), fix=_AGAIN) from None
    if not isinstance(value, dict):
        raise ConvertError(f"{path} holds no keys", fix=_AGAIN)
    return value


def _weights(path: Path) -> Tensors:
    for stem, ending, reader in (("model", "safetensors", Safetensors), ("pytorch_model", "bin", Pickled)):
        index, single = path / f"{stem}.{ending}.index.json", path / f"{stem}.{ending}"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) and v == Path(v).name for v in weight_map.values()):
                raise ConvertError(f"{index} has no weight_map from tensors to files in its folder", fix=_AGAIN)
            files = [path / name for name in sorted(set(weight_map.values()))]
            if missing := [f for f in files if not f.is_file()]:
                raise ConvertError(f"{missing[0]} is missing", why=f"{index.name} names it", fix=_AGAIN)
            return reader(files)
        if single.is_file():
            return reader([single])
    loose = sorted(path.glob("model-*.safetensors"))
    if loose:
        raise ConvertError(f"{path / 'model.safetensors.index.json'} is missing", why=f"{loose[0].name} is one of several", fix=_AGAIN)
    raise ConvertError(f"{path} holds no weights", why="there is neither model.safetensors nor pytorch_model.bin", fix=_AGAIN)


class Safetensors(Tensors):
    """Shards of which each tensor is a mapping of its own, so that no more is in memory than is in use."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.found: dict[str, tuple[Path, int, list[int], torch.dtype]] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt", device="cpu"):
                    pass  # the library checks header and size
                with path.open("rb") as f:
                    length = int.from_bytes(f.read(8), "little")
                    header = json.loads(f.read(length))
            except (SafetensorError, ValueError) as e:
                raise ConvertError(f"{path} is damaged", why=str(e), fix=_AGAIN) from None
            except OSError as e:
                raise ConvertError(f"{path} cannot be read", why=(e.strerror or str(e)).lower(), fix="Check its permissions.") from None
            header.pop("__metadata__", None)
            for name, one in header.items():
                if one["dtype"] not in _TYPES:
                    raise ConvertError(
                        f"{path} holds {name} as {one['dtype']}",
                        why="it is quantised or of a type that training does not use",
                        fix="Import the model that it was made from.",
                    )
                self.found[name] = path, 8 + length + one["data_offsets"][0], one["shape"], _TYPES[one["dtype"]]

    @property
    def names(self) -> list[str]:
        return list(self.found)

    def shape(self, name: str) -> list[int]:
        return self.found[name][2]

    def dtype(self, name: str) -> torch.dtype:
        return self.found[name][3]

    def read(self, name: str) -> Tensor:
        path, offset, shape, dtype = self.found[name]
        try:
            return mapped(path, dtype=dtype, shape=shape, offset=offset)
        except OSError as e:
            if e.errno == errno.ENOMEM:
                raise MemoryError from None
            raise ConvertError(f"{path} cannot be read", why=(e.strerror or str(e)).lower(), fix=_AGAIN) from None


class Held(Tensors):
    """Tensors that are in memory, or mapped into it from a file."""

    def __init__(self, found: Mapping[str, Tensor]) -> None:
        self.found = dict(found)

    @property
    def names(self) -> list[str]:
        return list(self.found)

    def shape(self, name: str) -> list[int]:
        return list(self.found[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.found[name].dtype

    def read(self, name: str) -> Tensor:
        return self.found[name]


class Pickled(Held):
    """torch.save's files through its loader for weights alone, which runs no code; mapped, not
    read, until a tensor is used.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        super().__init__({})
        for path in files:
            state = load_safely(path)
            if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
                raise ConvertError(f"{path} does not map names to tensors", fix=_AGAIN)
            self.found |= state

    def read(self, name: str) -> Tensor:
        tensor = self.found[name].clone()
        release(self.found[name])
        return tensor


def load_safely(path: Path) -> Any:
    """torch.load of tensors and plain values only; ConvertError where the file is damaged or holds
    anything else.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as e:
            if "mmap" not in str(e):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError as e:
        reason = next((line.strip() for line in str(e).splitlines() if "WeightsUnpickler error" in line or "GLOBAL" in line), "")
        raise ConvertError(
            f"{path} cannot be loaded safely",
            why=reason or "it holds more than tensors and plain values, or is damaged",
            fix="Save it again with tensors and plain values only.",
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as e:
        raise ConvertError(f"{path} is damaged", why=(str(e).splitlines() or ["it ends too early"])[0], fix=_AGAIN) from None


def release(tensor: Tensor) -> None:
    """Give back the pages of a tensor that torch.load mapped from a file; they are read again if it
    is used again.
    """
    storage = tensor.untyped_storage()
    first = storage.data_ptr() + tensor.storage_offset() * tensor.element_size()
    start, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, (first + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start and _mapped(start, end):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _mapped(start: int, end: int) -> bool:
    """Whether memory is an unchanged private mapping of a file: only there does giving it back lose
    nothing.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        span, mode, _, _, inode, *_ = line.split()
        low, high = (int(x, 16) for x in span.split("-"))
        if low <= start and end <= high:
            return inode != "0" and mode.endswith("p")
    return False


class _Prefixed(Tensors):
    """Names as the whole model has them, of files saved from its inner part."""

    def __init__(self, inner: Tensors, prefix: str) -> None:
        self.inner, self.prefix = inner, prefix

    @classmethod
    def where_needed(cls, tensors: Tensors, form: Format) -> Tensors:
        prefix = form.inner
        return tensors if any(n.startswith(prefix) for n in tensors.names) else cls(tensors, prefix)

    def _own(self, name: str) -> str:
        return name if name.startswith("lm_head.") else name.removeprefix(self.prefix)

    @property
    def names(self) -> list[str]:
        return [n if n.startswith("lm_head.") else self.prefix + n for n in self.inner.names]

    def shape(self, name: str) -> list[int]:
        return self.inner.shape(self._own(name))

    def dtype(self, name: str) -> torch.dtype:
        return self.inner.dtype(self._own(name))

    def read(self, name: str) -> Tensor:
        return self.inner.read(self._own(name))


# -- other formats --------------------------------------------------------------------------------------


def _nanogpt(path: Path) -> Source:
    state = load_safely(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict) or not isinstance(state.get("model_args"), dict):
        has = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ConvertError(
            f"{path} is not nanoGPT's checkpoint: it has {has}",
            why="nanoGPT saves model and model_args",
            fix="Name a ckpt.pt that its train.py wrote.",
        )
    found = {}
    for name, tensor in state["model"].items():
        if not isinstance(tensor, Tensor):
            raise ConvertError(f"{path} holds {name} that is no tensor", fix=_AGAIN)
        found[name.removeprefix("_orig_mod.")] = tensor  # torch.compile's prefix
    held = Pickled([])
    held.found = found
    return Source(str(path), FORMATS["nanogpt"][1], state["model_args"], held)


def _gguf(path: Path) -> Source:
    """Through transformers, which turns the blocks back into numbers; the whole model is in memory."""
    if missing := [name for name in GGUF_PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConvertError(
            f"{path} needs {' and '.join(missing)}, not installed here",
            why="transformers reads GGUF with them",
            fix=f"Install them: pip install {' '.join(missing)}.",
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(path.parent), path.name
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, torch_dtype=torch.float32)
    except Exception as e:  # the reader's errors are of many kinds
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ConvertError(f"{path} cannot be read by transformers", why=reason, fix="Import a folder with safetensors instead.") from None
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    files = {"config.json": json.dumps(config, indent=2).encode()}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        files |= _saved(tokenizer)
    except Exception as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        if "'no_vocab'" not in reason:  # the file says that it has none
            raise ConvertError(f"the tokenizer in {path} cannot be read by transformers", why=reason, fix="Set --no-tokenizer.") from None
    if model.generation_config is not None:
        files["generation_config.json"] = model.generation_config.to_json_string().encode()
    return Source(str(path), format_of(config, where=str(path)), config, Held(model.state_dict()), files)


def _saved(tokenizer: Any) -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return carried_files(Path(folder))


def tokenizer_size(text: bytes) -> int:
    """One more than the largest id in a tokenizer.json; 0 where it cannot be told."""
    try:
        content = json.loads(text)
        vocab = content["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
        ids += [t["id"] for t in content.get("added_tokens") or ()]
        return int(max(ids, default=-1)) + 1
    except (ValueError, KeyError, TypeError):
        return 0


def some(names: Iterable[str]) -> str:
    """Up to three names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(re.sub(r"\s+", " ", n) for n in listed[:3]) + more
