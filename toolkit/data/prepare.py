"""Text to Megatron .bin/.idx: many processes, resumable, and never a half-written file where a
reader looks.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import platform
import shutil
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.encode import Helpers, Shard, encode_shard, id_dtype, part_path
from toolkit.data.indexed import add_counts, entropy
from toolkit.data.manifest import (
    FORMAT,
    Manifest,
    ShardRecord,
    TokenizerRecord,
    load_manifest,
    manifest_path,
    save_manifest,
)
from toolkit.data.progress import PrepareBar
from toolkit.data.sources import Source, open_source
from toolkit.data.tokenizer import TextTokenizer, load_tokenizer, training_size
from toolkit.errors import DataError
from toolkit.files import FileRecord, file_sha256, sync_file, sync_folder, write_durably

log = logging.getLogger(__name__)

SHARD_BYTES = 1 << 22
_LIBRARIES = ("tokenizers", "gigatoken", "datasets", "megatron-core", "numpy")


def prepare(
    source: str,
    *,
    out: str | Path,
    tokenizer: str = "bytes",
    text_key: str = "text",
    workers: int = 1,
    eod: str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Turn a source's text into OUT.bin, OUT.idx and OUT.manifest.json, or reuse them when they
    already hold it.

    source: see open_source; tokenizer: see load_tokenizer; out: prefix of the files; workers:
    encoding processes (up to 1: in this one);
    eod: text of the end-of-document token, if not the usual; progress: show a bar on stderr (None:
    on a terminal);
    shard_bytes: text encoded and kept as one piece. The files depend on the text and the tokenizer
    only, not on workers or interruptions. Raises DataError for a source or tokenizer that cannot be
    read, for no tokens at all, and for an OUT that holds something else.
    """
    text = open_source(source, text_key=text_key)
    if tokenizer.startswith("train:"):
        training_size(tokenizer)
    elif tokenizer != "bytes" and Path(tokenizer).expanduser().exists():
        tokenizer = str(Path(tokenizer).expanduser())
    prefix = Path(out)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with _locked(prefix):
            if (manifest := _finished(prefix, text, tokenizer=tokenizer, eod=eod)) is not None:
                log.info("%s already holds %s (%d tokens); reusing it", prefix, source, manifest.tokens)
                return manifest
            if not overwrite:
                _refuse_other(prefix, text, tokenizer=tokenizer)
            return _run(text, tokenizer=tokenizer, eod=eod, prefix=prefix, workers=workers, progress=progress, shard_bytes=shard_bytes)
    except OSError as e:
        raise DataError(f"{prefix} cannot be written", why=str(e), fix="Choose another place, or free space there.") from e


def _run(text: Source, *, tokenizer: str, eod: str | None, prefix: Path, workers: int, progress: bool | None, shard_bytes: int) -> Manifest:
    work = _work_folder(prefix)
    job = {"format": FORMAT, "source": text.spec, "fingerprint": text.fingerprint, "text_key": text.text_key, "shard_bytes": shard_bytes}
    job |= {"tokenizer": tokenizer, "eod": eod}
    if work.exists() and _read_json(work / "job.json") != job:
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_durably(work / "job.json", json.dumps(job))
    if tokenizer.startswith("train:"):
        log.info("training tokenizer %s on %s", tokenizer, text.spec)
    tok = load_tokenizer(tokenizer, train_on=text.documents(), cache=work / "trained.json", eod=eod)
    if tok.json is not None:
        write_durably(work / "tokenizer.json", tok.json)
    shards, skipped = _encode_all(text, tok, work=work, workers=workers, progress=progress, shard_bytes=shard_bytes)
    if not shards:
        raise DataError(
            f"data.source={text.spec} yields no tokens", why=f"all of its {skipped} documents are empty", fix="Choose another source."
        )
    manifest = _assemble(shards, skipped=skipped, text=text, tok=tok, work=work, prefix=prefix)
    shutil.rmtree(work)
    return manifest


# --- what is already there


def _work_folder(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.work")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _locked(prefix: Path) -> Iterator[None]:
    """One process at a time per target; the kernel frees the lock of a killed one. The file stays:
    removing it would race.
    """
    with prefix.with_name(f".{prefix.name}.lock").open("a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s is being prepared by another process; waiting for it", prefix)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _finished(prefix: Path, text: Source, *, tokenizer: str, eod: str | None) -> Manifest | None:
    """The manifest of the same source and tokenizer, if its files are whole."""
    if not manifest_path(prefix).exists():
        return None
    try:
        manifest = load_manifest(prefix)
    except DataError as e:
        log.warning("%s; preparing it again", e)
        return None
    same_name = manifest.source == text.spec or text.kind == "files"  # files are the same whatever path leads to them
    if not same_name or (manifest.source_fingerprint, manifest.tokenizer.spec) != (text.fingerprint, tokenizer):
        return None
    if tokenizer == "bytes" or tokenizer.startswith("train:") or not Path(tokenizer).exists():
        return manifest
    now = load_tokenizer(tokenizer, eod=eod)
    return manifest if (now.hash, now.eod) == (manifest.tokenizer.hash, manifest.tokenizer.eod) else None


def _refuse_other(prefix: Path, text: Source, *, tokenizer: str) -> None:
    record = _read_json(manifest_path(prefix))
    if isinstance(record, dict) and record.get("source"):
        existing = (record.get("source"), (record.get("tokenizer") or {}).get("spec"))
        if existing == (text.spec, tokenizer):
            if record.get("source_fingerprint") == text.fingerprint and (record.get("tokenizer") or {}).get("spec") == tokenizer:
                return  # the same data, damaged
            why = "its text or its tokenizer has changed since"
        else:
            why = f"not {text.spec} with tokenizer {tokenizer}"
        raise DataError(
            f"{prefix} holds {existing[0]} with tokenizer {existing[1]}", why=why, fix="Choose another --out, or add --overwrite."
        )
    # Files of an interrupted end of preparing have a work folder beside them.
    if not _work_folder(prefix).exists() and any(Path(f"{prefix}{s}").exists() for s in (".bin", ".idx")):
        raise DataError(
            f"{prefix}.bin/.idx exist without a manifest",
            why="they were made by something else",
            fix="Choose another --out, or add --overwrite.",
        )


# --- encoding


def _shards(text: Source, *, shard_bytes: int, skipped: list[int]) -> Iterator[Shard]:
    """Cut the documents into shards by their sizes alone; skipped[0] counts the empty ones."""
    shard, digest = Shard(0), hashlib.sha256()
    for document in text.documents():
        if not document:
            skipped[0] += 1
            continue
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        shard.texts.append(document)
        shard.bytes += len(data)
        if shard.bytes >= shard_bytes:
            shard.sha256 = digest.hexdigest()
            yield shard
            shard, digest = Shard(shard.number + 1), hashlib.sha256()
    if shard.texts:
        shard.sha256 = digest.hexdigest()
        yield shard


def _encode_all(
    text: Source, tok: TextTokenizer, *, work: Path, workers: int, progress: bool | None, shard_bytes: int
) -> tuple[list[dict[str, Any]], int]:
    """Encode every shard that is not already there; returns the records in order and the number of
    empty documents.
    """
    records: list[dict[str, Any] | None] = []
    waiting: deque[tuple[int, Future[dict[str, Any]]]] = deque()
    skipped = [0]
    reused = 0
    helpers: Helpers | None = None
    bar = PrepareBar(text, shown=progress)
    with bar:

        def settle() -> None:
            number, future = waiting.popleft()
            records[number] = future.result()
            bar.add(records[number])

        try:
            for shard in _shards(text, shard_bytes=shard_bytes, skipped=skipped):
                record = _read_json(part_path(work, shard.number, ".json"))
                if record is not None and record["text_sha256"] == shard.sha256:
                    reused += 1
                    records.append(record)
                    bar.add(record)
                    continue
                records.append(None)
                if workers <= 1:
                    records[-1] = encode_shard(shard, tok=tok, work=work)
                    bar.add(records[-1])
                    continue
                if helpers is None:
                    helpers = Helpers(workers, tok=tok, work=work)
                waiting.append((shard.number, helpers.submit(shard)))
                # Bounds the text held in memory.
                if len(waiting) >= 2 * workers:
                    settle()
            while waiting:
                settle()
        finally:
            if helpers is not None:
                helpers.close()
    if reused:
        log.info("%d of %d shards were already encoded", reused, len(records))
    return [r for r in records if r is not None], skipped[0]


# --- putting the parts together


def _assemble(shards: Sequence[dict[str, Any]], *, skipped: int, text: Source, tok: TextTokenizer, work: Path, prefix: Path) -> Manifest:
    """Join the parts with megatron-core's builder in the work folder, then move the files into
    place, the manifest last.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core warns about optional packages at import
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(tok.vocab_size)
    builder = IndexedDatasetBuilder(str(work / "all.bin"), dtype=dtype)
    counts = np.zeros(0, dtype=np.int64)
    for number in range(len(shards)):
        ids = np.fromfile(part_path(work, number, ".bin"), dtype=id_dtype(tok.vocab_size))
        position = 0
        arrays = np.load(part_path(work, number, ".npz"))
        for length in arrays["lengths"].tolist():
            builder.add_document(ids[position : position + length], [length])
            position += length
        counts = add_counts(counts, arrays["counts"])
    builder.finalize(str(work / "all.idx"))
    moves = [(work / "all.bin", Path(f"{prefix}.bin")), (work / "all.idx", Path(f"{prefix}.idx"))]
    if tok.json is not None:
        moves.append((work / "tokenizer.json", Path(f"{prefix}.tokenizer.json")))
    files = []
    for made, target in moves:
        sync_file(made)
        files.append(FileRecord(name=target.name, bytes=made.stat().st_size, sha256=file_sha256(made)))
    keys = set(ShardRecord.model_fields)
    manifest = Manifest(
        source=text.spec,
        source_fingerprint=text.fingerprint,
        text_key=text.text_key,
        tokenizer=TokenizerRecord(
            spec=tok.spec, hash=tok.hash, vocab_size=tok.vocab_size, eod=tok.eod, file=moves[2][1].name if tok.json is not None else None
        ),
        documents=sum(s["documents"] for s in shards),
        skipped=skipped,
        tokens=sum(s["tokens"] for s in shards),
        characters=sum(s["characters"] for s in shards),
        bytes=sum(s["bytes"] for s in shards),
        dtype=np.dtype(dtype).name,
        entropy=entropy(counts),
        files=files,
        shards=[ShardRecord(**{k: s[k] for k in keys}) for s in shards],
        versions=_versions(),
    )
    # From here to the new manifest the prefix has none, so no reader can take old counts for new files.
    manifest_path(prefix).unlink(missing_ok=True)
    for made, target in moves:
        made.replace(target)
    sync_folder(prefix.parent)
    save_manifest(manifest, prefix)
    sync_folder(prefix.parent)
    return manifest


def _versions() -> dict[str, str]:
    """Of what the ids may depend on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
