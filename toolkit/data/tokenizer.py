"""Text to token ids and back: bytes, a tokenizer.json, a Hugging Face name, or a BPE trained on the spot."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.sources import refuse_mistyped
from toolkit.errors import DataError
from toolkit.files import write_durably

log = logging.getLogger(__name__)

END_OF_DOCUMENT = "<|endoftext|>"
_EOD_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|end|>")
# A merge table learns nothing new from more text than this, and training keeps all distinct words in memory.
TRAINING_CHARACTERS = 200_000_000


class TextTokenizer:
    """What preparing and generating need of a tokenizer; no beginning-of-text id is ever added.

    vocab_size: one more than the largest id; eod: the id that ends a document; hash: sha256 of what
    decides the ids;
    json: contents of tokenizer.json, or None; encode_batch: one integer array per text, without the
    end-of-document id.
    """

    spec: str
    vocab_size: int
    eod: int
    hash: str
    json: str | None = None

    def encode_batch(self, texts: Sequence[str], *, fast: bool = False) -> list[np.ndarray]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """The text of ids; special: tokens that stand for no text of a document, such as its end,
        are written out too.
        """
        raise NotImplementedError

    def encode_prompt(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text to go on from; special: with the tokens that the tokenizer itself puts
        around a text (Llama's first one).

        Raises DataError where some of the text has no id of its own.
        """
        raise NotImplementedError

    def fast_agrees(self, sample: Sequence[str]) -> bool:
        """Whether a faster encoder exists and gives identical ids for every text of the sample."""
        return False


class BytesTokenizer(TextTokenizer):
    """UTF-8 bytes as ids 0..255, and 256 for the end of a document."""

    def __init__(self) -> None:
        self.spec, self.vocab_size, self.eod = "bytes", 257, 256
        self.hash = hashlib.sha256(b"utf-8 bytes, end of document 256").hexdigest()

    def encode_batch(self, texts: Sequence[str], *, fast: bool = False) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", "replace")

    def encode_prompt(self, text: str, *, special: bool) -> list[int]:
        return list(text.encode("utf-8", "replace"))


class SubwordTokenizer(TextTokenizer):
    """A tokenizer.json run by Hugging Face `tokenizers`, or by `gigatoken` where that gives the same ids.

    eod: the end-of-document token's text; when None a usual name is looked for, and if there is
    none one more id is added.
    """

    def __init__(self, spec: str, *, text: str, eod: str | None = None) -> None:
        self.spec, self.json, self._eod = spec, text, eod
        tok = self._slow
        top = max(tok.get_vocab(with_added_tokens=True).values(), default=-1)
        names = [eod] if eod is not None else list(_EOD_NAMES)
        ids = [i for i in (tok.token_to_id(name) for name in names) if i is not None]
        if eod is not None and not ids:
            raise DataError(
                f"tokenizer {spec} has no token {eod!r}", why="it was named as the end-of-document token", fix="Name a token it has."
            )
        self.eod = ids[0] if ids else top + 1
        if not ids:
            log.warning("tokenizer %s names no end-of-document token: id %d is added for it", spec, self.eod)
        self.vocab_size = max(top, self.eod) + 1

    @cached_property
    def hash(self) -> str:  # type: ignore[override]
        """Worked out when it is asked for: a large vocabulary takes longer to parse than to load."""
        return _content_hash(self.json or "")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_slow", "_fast", "_unknown")}

    @cached_property
    def _slow(self) -> Any:
        from tokenizers import Tokenizer

        try:
            tok = Tokenizer.from_str(self.json or "")
        except Exception as e:
            raise DataError(
                f"tokenizer {self.spec} cannot be loaded", why=str(e), fix="Give a tokenizer.json of Hugging Face tokenizers."
            ) from None
        tok.no_truncation()
        tok.no_padding()
        return tok

    @cached_property
    def _fast(self) -> Any | None:
        if importlib.util.find_spec("gigatoken") is None:
            return None
        try:
            import gigatoken

            return gigatoken.Tokenizer.from_json(self.json or "")
        except Exception as e:
            log.info("gigatoken cannot run tokenizer %s (%s); using tokenizers", self.spec, e)
            return None

    def encode_batch(self, texts: Sequence[str], *, fast: bool = False) -> list[np.ndarray]:
        if fast:
            return [self._fast.encode(text) for text in texts]  # type: ignore[union-attr]
        return [np.array(e.ids, dtype=np.uint32) for e in self._slow.encode_batch_fast(list(texts), add_special_tokens=False)]

    def fast_agrees(self, sample: Sequence[str]) -> bool:
        if self._fast is None:
            return False
        try:
            fast = self.encode_batch(sample, fast=True)
        except Exception as e:
            log.info("gigatoken failed on tokenizer %s (%s); using tokenizers", self.spec, e)
            return False
        same = all(map(np.array_equal, fast, self.encode_batch(sample)))
        if not same:
            log.info("gigatoken gives other ids than tokenizers for %s; using tokenizers", self.spec)
        return same

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        known = [i for i in map(int, ids) if self._slow.id_to_token(i) is not None]
        return str(self._slow.decode(known, skip_special_tokens=not special))

    def encode_prompt(self, text: str, *, special: bool) -> list[int]:
        encoded = self._slow.encode(text, add_special_tokens=special)
        covered = 0
        for i, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            # what has no id becomes the unknown token, or nothing at all
            if text[covered:start].strip():
                raise self._no_id(text[covered:start], covered)
            if i == self._unknown and end > start and text[start:end] != self._slow.id_to_token(i):
                raise self._no_id(text[start:end], start)
            covered = max(covered, end)
        if text[covered:].strip():
            raise self._no_id(text[covered:], covered)
        return list(encoded.ids)

    def _no_id(self, text: str, at: int) -> DataError:
        shown = text if len(text) <= 20 else text[:20] + "…"
        return DataError(
            f"the tokenizer {self.spec} has no token for {shown!r}, at character {at + 1}",
            why="the model has never seen it",
            fix="Leave it out, or use a tokenizer of bytes.",
        )

    @cached_property
    def _unknown(self) -> int | None:
        """The id that stands for text without one; None where every text has ids."""
        model = self._slow.model
        if getattr(model, "byte_fallback", False):
            return None
        unknown = getattr(model, "unk_token", None)
        if isinstance(unknown, str):
            found = self._slow.token_to_id(unknown)
            return None if found is None else int(found)
        if type(model).__name__ == "Unigram":  # shows its own only in its JSON
            number = (json.loads(self.json or "{}").get("model") or {}).get("unk_id")
            return int(number) if isinstance(number, int) else None
        return None


def load_tokenizer(spec: str, *, train_on: Iterable[str] | None = None, cache: Path | None = None, eod: str | None = None) -> TextTokenizer:
    """Load or train the tokenizer a spec names.

    spec: `bytes`; a tokenizer.json; a folder or Hugging Face name; `train:N` (byte-level BPE of N
    ids learned from train_on).
    cache: a tokenizer.json that a trained one is kept in and read back from. eod: text of the
    end-of-document token, if not the usual. Raises DataError when it is missing, unreadable, or has
    to be trained without text.
    """
    if spec == "bytes":
        return BytesTokenizer()
    if spec.startswith("train:"):
        size = training_size(spec)
        if cache is None or not cache.exists():
            if train_on is None:
                raise DataError(
                    f"data.tokenizer={spec}",
                    why="there is no text to train it on here",
                    fix="Give the tokenizer.json that preparing saved.",
                )
            text = _train(train_on, size=size)
            if cache is not None:
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_durably(cache, text)
        else:
            text = cache.read_text(encoding="utf-8")
        return SubwordTokenizer(spec, text=text, eod=END_OF_DOCUMENT)
    text, named_eod = _find(spec)
    return SubwordTokenizer(spec, text=text, eod=eod or named_eod)


def training_size(spec: str) -> int:
    """The N of `train:N`; raises DataError unless it is a number a byte-level BPE can have."""
    tail = spec.partition(":")[2]
    if not tail.isdigit() or not 257 <= int(tail) < 2**31:
        raise DataError(
            f"data.tokenizer={spec}",
            why="train:N needs an N of at least 257 (256 bytes and the end of a document)",
            fix="Set it to, say, train:8192.",
        )
    return int(tail)


def _train(documents: Iterable[str], *, size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def bounded() -> Iterator[str]:
        left = TRAINING_CHARACTERS
        for text in documents:
            if left <= 0:
                log.info("tokenizer training stops after %d characters", TRAINING_CHARACTERS)
                return
            left -= len(text)
            yield text

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    # The alphabet comes as a set of strings, whose order changes from process to process.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END_OF_DOCUMENT], initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(bounded(), trainer)
    if tok.get_vocab_size() < size:
        log.warning("the text yields only %d of the %d ids asked for", tok.get_vocab_size(), size)
    return str(tok.to_str())


def _find(spec: str) -> tuple[str, str | None]:
    """Contents of the tokenizer.json a spec leads to, and the end-of-text token its config names."""
    path = Path(spec).expanduser()
    if not spec:
        raise DataError("data.tokenizer is empty", why="the data needs one", fix=_HOW_TO_SET)
    if path.is_dir() and not (path / "tokenizer.json").exists():
        return _from_transformers(spec)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(
                f"data.tokenizer={spec} cannot be read", why=str(e), fix="Give a tokenizer.json of Hugging Face tokenizers."
            ) from None
        config = path.with_name("tokenizer_config.json")
        return text, _named_eod(config.read_text(encoding="utf-8") if config.is_file() else None)
    if spec.startswith(("/", "./", "../", "~")) or spec.endswith((".json", ".model")) or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", spec):
        refuse_mistyped(spec, key="data.tokenizer", fix=_HOW_TO_SET)
        raise DataError(f"data.tokenizer={spec}", why="no such file or folder", fix=_HOW_TO_SET)
    refuse_mistyped(spec, key="data.tokenizer", fix=_HOW_TO_SET)
    return _from_hub(spec)


_HOW_TO_SET = "Set data.tokenizer to bytes, to train:8192, to a tokenizer.json, or to a Hugging Face name."


def _from_hub(name: str) -> tuple[str, str | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        text = Path(hf_hub_download(name, "tokenizer.json")).read_text(encoding="utf-8")
        try:
            config: str | None = Path(hf_hub_download(name, "tokenizer_config.json")).read_text(encoding="utf-8")
        except EntryNotFoundError:
            config = None
        return text, _named_eod(config)
    except LocalEntryNotFoundError as e:
        raise _unreachable(name, e) from None
    except EntryNotFoundError:
        return _from_transformers(name)
    except Exception as e:
        raise _unreachable(name, e) from None


def _from_transformers(name: str) -> tuple[str, str | None]:
    """For the few that ship no tokenizer.json: transformers converts them."""
    try:
        from transformers import AutoTokenizer

        tok = AutoTokenizer.from_pretrained(name)
        return str(tok.backend_tokenizer.to_str()), tok.eos_token
    except Exception as e:
        raise _unreachable(name, e) from None


def _unreachable(name: str, error: Exception) -> DataError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(
        f"data.tokenizer={name} could not be loaded from Hugging Face",
        why=first,
        fix="Check the name, connect to the network once so that it is cached (HF_TOKEN for a gated one), or set data.tokenizer to a local "
        "tokenizer.json, to bytes or to train:8192.",
    )


def _named_eod(config: str | None) -> str | None:
    if config is None:
        return None
    try:
        token = json.loads(config).get("eos_token")
    except (ValueError, AttributeError):
        return None
    return token.get("content") if isinstance(token, dict) else token


def _content_hash(text: str) -> str:
    """sha256 over what decides the ids, whatever the layout of the JSON or the library version that
    wrote it.
    """
    content = json.loads(text)
    model = dict(content.get("model") or {})
    if "merges" in model:
        model["merges"] = [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model["merges"]]
    kept = {key: content.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer")} | {"model": model}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()


def spread(texts: Sequence[str], *, count: int = 8) -> list[str]:
    """The first half of count texts, and as many spread evenly over the rest: what the fast encoder
    is checked on.
    """
    head = list(islice(texts, count // 2))
    rest = texts[len(head) :]
    return head + list(rest[:: max(1, len(rest) // max(1, count - len(head)))])[: count - len(head)]
