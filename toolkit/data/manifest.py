"""The manifest beside prepared data: what it holds, and the proof that it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from toolkit.data.indexed import read_index
from toolkit.data.tokenizer import BytesTokenizer, SubwordTokenizer, TextTokenizer
from toolkit.data.vocabulary import SUFFIX
from toolkit.errors import DataError
from toolkit.files import FileRecord, file_sha256, write_durably

FORMAT = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerRecord(_Part):
    """spec: as asked for; hash: sha256 of what decides the ids; file: name of the tokenizer.json
    beside the manifest, null for bytes.
    """

    spec: str
    hash: str
    vocab_size: int
    eod: int
    file: str | None = None


class ShardRecord(_Part):
    """One run of consecutive documents, encoded as a whole; text_sha256 covers their text and borders."""

    documents: int
    tokens: int
    text_sha256: str
    encoder: Literal["bytes", "tokenizers", "gigatoken"]


class Manifest(_Part):
    """A prepared data set; a .bin/.idx pair without one was not finished.

    documents, tokens, characters, bytes: totals (tokens count the end-of-document ids, bytes are of
    the UTF-8 text);
    skipped: empty documents left out; entropy: unigram entropy of the ids in nats, the loss of a
    model that only knows frequencies.
    """

    format: int = FORMAT
    source: str
    source_fingerprint: str
    text_key: str
    tokenizer: TokenizerRecord
    documents: int
    skipped: int
    tokens: int
    characters: int
    bytes: int
    dtype: str
    entropy: float
    files: list[FileRecord]
    shards: list[ShardRecord]
    versions: dict[str, str]


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}{SUFFIX}")


def save_manifest(manifest: Manifest, prefix: str | Path) -> None:
    """Write the manifest, whole or not at all; the last act of preparing."""
    write_durably(manifest_path(prefix), manifest.model_dump_json(indent=1) + "\n")


def load_manifest(prefix: str | Path, *, verify: Literal["sizes", "hashes"] = "sizes") -> Manifest:
    """Read a prefix's manifest and hold its files to it.

    verify: sizes (also reads the index), or hashes (reads every byte). Raises DataError naming the
    file and what is wrong with it.
    """
    path = manifest_path(prefix)
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", why="the data was never prepared, or preparing did not finish", fix=_PREPARE) from None
    except OSError as e:
        raise DataError(f"{path} cannot be read", why=str(e), fix="Make the file readable.") from None
    except ValidationError as e:
        error = e.errors()[0]
        where = ".".join(map(str, error["loc"])) or "the file"
        raise DataError(f"{path} is not a manifest", why=f"{where}: {error['msg']}", fix=_PREPARE) from None
    if manifest.format != FORMAT:
        raise DataError(f"{path} has format {manifest.format}", why=f"this version reads format {FORMAT}", fix=_PREPARE)
    for record in manifest.files:
        file = path.with_name(record.name)
        if not file.is_file():
            raise DataError(f"{file} is missing", why=f"{path.name} lists it", fix=_PREPARE)
        size = file.stat().st_size
        if size != record.bytes:
            raise DataError(
                f"{file} has {size} bytes", why=f"{path.name} says {record.bytes}: the file is cut short or was changed", fix=_PREPARE
            )
        if verify == "hashes" and file_sha256(file) != record.sha256:
            raise DataError(f"{file} does not match its sha256 in {path.name}", why="the file was changed or damaged", fix=_PREPARE)
    index = read_index(prefix)
    if index.tokens != manifest.tokens or index.documents != manifest.documents:
        raise DataError(
            f"{prefix}.idx lists {index.documents} documents of {index.tokens} tokens",
            why=f"{path.name} says {manifest.documents} of {manifest.tokens}",
            fix=_PREPARE,
        )
    return manifest


_PREPARE = "Run `toolkit data prepare` again with this --out."


def tokenizer_of(manifest: Manifest, prefix: str | Path) -> TextTokenizer:
    """The very tokenizer the data was made with, from the copy beside it; needs no network."""
    record = manifest.tokenizer
    if record.file is None:
        return BytesTokenizer()
    text = manifest_path(prefix).with_name(record.file).read_text(encoding="utf-8")
    tok = SubwordTokenizer(record.spec, text=text)
    tok.eod, tok.vocab_size = record.eod, record.vocab_size
    return tok
