"""From the data section to prepared files, checked before any process group exists, and to
megatron-core datasets.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.data.given import GivenData
from toolkit.data.indexed import Index, count_ids, entropy, read_index
from toolkit.data.manifest import Manifest, load_manifest, manifest_path
from toolkit.data.prepare import prepare
from toolkit.data.sources import is_source_path, open_source
from toolkit.data.tokenizer import load_tokenizer
from toolkit.errors import DataError, ToolkitError
from toolkit.files import write_durably

if TYPE_CHECKING:
    from toolkit.config.schema import RunConfig

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """What a run reads, resolved and checked.

    weights: of each prefix, summing to 1; vocab_size: ids the model must know; eod, tokenizer (its
    spec), tokenizer_hash: None for data without a manifest; entropy: unigram entropy in nats (for a
    blend the weighted mean of its members', never more than the mixture's);
    identity: changes when any file's contents do.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...]
    vocab_size: int
    eod: int | None
    tokenizer: str | None
    tokenizer_hash: str | None
    entropy: float
    tokens: int
    documents: int
    identity: str
    cache_dir: Path

    @property
    def summary(self) -> str:
        """The data in a few words, for the start of a run."""
        return f"{self.tokens:,} tokens, unigram entropy {self.entropy:.3f} nats"


@dataclass(frozen=True, kw_only=True)
class Member:
    """One prepared prefix: its index, its manifest (None for data made elsewhere), ids, entropy in
    nats, and what its contents are told from.
    """

    prefix: str
    index: Index
    manifest: Manifest | None
    vocab_size: int
    entropy: float
    identity: str


def cache_dir_of(config: RunConfig) -> Path:
    """Where prepared data and indices of this run live: data.cache_dir, or data/ beside the run folder."""
    return (config.data.cache_dir or config.run.dir.parent / "data").expanduser()


def resolve_data(config: RunConfig, *, prepare_missing: bool) -> PreparedData:
    """Find, and if allowed prepare, what data.source or data.blend name, and check it against the
    rest of the config.

    Needs no process group and no torch, unless something has to be prepared. Two processes may call
    it at once. Raises DataError for missing, damaged or unfinished files, a tokenizer that is not
    the data's, a blend of different tokenizers, a model.vocab_size that is too small, and a split
    with fewer tokens than one sample takes.
    """
    members = open_members(config, prepare_missing=prepare_missing)
    named = list(config.data.blend.values()) if config.data.blend else [1.0]
    weights = tuple(weight / sum(named) for weight in named)
    first = _one_tokenizer(members)
    _check_tokenizer(config, first)
    vocab_size = max(m.vocab_size for m in members)
    if config.model.vocab_size is not None and config.model.vocab_size < vocab_size:
        raise DataError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {vocab_size} token ids of {members[0].prefix}",
            why="the embedding would have no row for the largest ids",
            fix=f"Set model.vocab_size to at least {vocab_size}, or to null.",
        )
    if config.data.document_mask:
        _check_ends(config, members)
    for member in members:
        _check_splits(config, member)
    return PreparedData(
        prefixes=tuple(m.prefix for m in members),
        weights=weights,
        vocab_size=vocab_size,
        eod=first.manifest.tokenizer.eod if first.manifest else None,
        tokenizer=first.manifest.tokenizer.spec if first.manifest else None,
        tokenizer_hash=first.manifest.tokenizer.hash if first.manifest else None,
        entropy=sum(w * m.entropy for w, m in zip(weights, members, strict=True)),
        tokens=sum(m.index.tokens for m in members),
        documents=sum(m.index.documents for m in members),
        identity=hashlib.sha256("".join(m.identity for m in members).encode()).hexdigest(),
        cache_dir=cache_dir_of(config),
    )


def tokenizer_file(config: RunConfig, *, tokenizer_hash: str) -> Path | None:
    """The tokenizer.json that a finished run's data was prepared with, from beside the data; None where
    the data is not on this disk, has none, or was prepared again with another.
    """
    data = config.data
    if not all(prefix_of(name) or is_source_path(name) for name in data.blend or [data.source or ""]):
        return None  # a data set of the hub, which is not asked for what it holds today
    try:
        members = open_members(config, prepare_missing=False)
    except (ToolkitError, OSError):
        return None
    for prefix, manifest in ((m.prefix, m.manifest) for m in members):
        if manifest is not None and manifest.tokenizer.file and manifest.tokenizer.hash == tokenizer_hash:
            return manifest_path(prefix).with_name(manifest.tokenizer.file)
    return None


def open_members(config: RunConfig, *, prepare_missing: bool) -> list[Member]:
    """The prepared prefixes of data.source or data.blend, each by itself whole; raises DataError as
    resolve_data() does.
    """
    data, cache = config.data, cache_dir_of(config)
    if not data.blend and not data.source:
        raise DataError("data.source is null", why="and data.blend names nothing either", fix="Set one of them.")
    members = []
    for name in data.blend or [data.source or ""]:
        if (prefix := prefix_of(name)) is None:
            prefix = _prepared_prefix(name, config=config, cache=cache, prepare_missing=prepare_missing)
        members.append(_open(prefix, cache=cache))
    return members


def prefix_of(name: str) -> str | None:
    """The absolute prefix a name leads to when it is one (`PREFIX`, `PREFIX.bin` or `PREFIX.idx`),
    else None.
    """
    base = str(Path(name).expanduser())
    for suffix in (".bin", ".idx"):
        base = base.removesuffix(suffix)
    exists = any(Path(f"{base}{s}").exists() for s in (".bin", ".idx")) or manifest_path(base).exists()
    if not exists and base == str(Path(name).expanduser()):
        return None
    return os.path.abspath(base)


def _prepared_prefix(name: str, *, config: RunConfig, cache: Path, prepare_missing: bool) -> str:
    """Prefix in the cache for a source that is not one itself; its name holds a digest of all that
    decides the ids.
    """
    data = config.data
    if data.blend:
        hint = "" if is_source_path(name) else " Prepare it first with `toolkit data prepare`."
        raise DataError(f"data.blend names {name}", why="there is no such prepared prefix (.idx and .bin)", fix=f"Correct the path.{hint}")
    source = open_source(name, text_key=data.text_key)
    spec = data.tokenizer
    content = load_tokenizer(spec).hash if Path(spec).expanduser().exists() else ""
    digest = hashlib.sha256(json.dumps([source.fingerprint, spec, content, data.text_key]).encode()).hexdigest()[:8]
    slug = "-".join(re.sub(r"[^\w.]+", "-", s).strip("-.")[-40:] for s in (Path(name).name, spec))
    prefix = os.path.abspath(cache / f"{slug}-{digest}")
    if not prepare_missing:
        if not manifest_path(prefix).exists():
            raise DataError(
                f"data.source={name} is not prepared",
                why=f"{manifest_path(prefix)} does not exist",
                fix=f"Run `toolkit data prepare {name} --tokenizer {spec} --out {prefix}`.",
            )
        return prefix
    prepare(name, tokenizer=spec, out=prefix, text_key=data.text_key, workers=min(8, len(os.sched_getaffinity(0))))
    return prefix


def _open(prefix: str, *, cache: Path) -> Member:
    if manifest_path(prefix).exists():
        manifest = load_manifest(prefix)
        return Member(
            prefix=prefix,
            index=read_index(prefix),
            manifest=manifest,
            vocab_size=manifest.tokenizer.vocab_size,
            entropy=manifest.entropy,
            identity="".join(f.sha256 for f in manifest.files),
        )
    if Path(f"{prefix}.work").exists():
        raise DataError(
            f"{prefix} is half-prepared", why="preparing was interrupted", fix="Run `toolkit data prepare` again; it goes on where it was."
        )
    index = read_index(prefix)
    identity = _stat_identity(prefix)
    largest, nats = _scan(index, identity=identity, cache=cache)
    return Member(prefix=prefix, index=index, manifest=None, vocab_size=largest + 1, entropy=nats, identity=identity)


def _stat_identity(prefix: str) -> str:
    stats = [os.stat(f"{prefix}{s}") for s in (".bin", ".idx")]
    return hashlib.sha256(json.dumps([prefix, [(s.st_size, s.st_mtime_ns) for s in stats]]).encode()).hexdigest()


def _scan(index: Index, *, identity: str, cache: Path) -> tuple[int, float]:
    """Largest id and entropy of data without a manifest, remembered in the cache since it takes
    reading all of it.
    """
    note = cache / "foreign" / f"{identity[:20]}.json"
    try:
        known = json.loads(note.read_bytes())
        return int(known["largest_id"]), float(known["entropy"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log.warning("%s has no manifest: its tokenizer is unknown, only its largest token id can be checked; reading all of it", index.prefix)
    counts = count_ids(index)
    largest, nats = len(counts) - 1, entropy(counts)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_durably(note, json.dumps({"prefix": index.prefix, "largest_id": largest, "entropy": nats}))
    except OSError as e:
        log.info("not remembered in %s: %s", note, e)
    return largest, nats


def _one_tokenizer(members: list[Member]) -> Member:
    """The member whose tokenizer stands for all; DataError when two differ."""
    known = [m for m in members if m.manifest is not None]
    for other in known[1:]:
        a, b = known[0].manifest, other.manifest
        assert a is not None and b is not None
        if (a.tokenizer.hash, a.tokenizer.eod) != (b.tokenizer.hash, b.tokenizer.eod):
            raise DataError(
                f"data.blend mixes tokenizers: {a.tokenizer.spec} in {known[0].prefix}, {b.tokenizer.spec} in {other.prefix}",
                why="the same id would mean different text",
                fix="Prepare all members with one tokenizer.",
            )
    if known and len(known) < len(members):
        log.warning("some members of data.blend have no manifest; that they share a tokenizer cannot be checked")
    return known[0] if known else members[0]


def _check_tokenizer(config: RunConfig, member: Member) -> None:
    """Hold a data.tokenizer that the user wrote to the one the data was made with."""
    if "tokenizer" not in config.data.model_fields_set or member.manifest is None:
        return
    spec, made = config.data.tokenizer, member.manifest.tokenizer
    if spec == made.spec and not Path(spec).expanduser().exists():
        return
    if spec.startswith("train:") or load_tokenizer(spec).hash != made.hash:
        raise DataError(
            f"data.tokenizer={spec} is not the tokenizer of {member.prefix}",
            why=f"that was made with {made.spec} ({made.vocab_size} ids, sha256 {made.hash[:12]}…)",
            fix=f"Remove data.tokenizer, set it to {made.spec}, or prepare the data again.",
        )


def _check_ends(config: RunConfig, members: list[Member]) -> None:
    """Refuse to keep documents apart whose ends nobody knows, and say how many best_fit has to cut."""
    size = config.train.seq_length
    for member in members:
        if config.data.packing == "concat" and member.manifest is None:
            raise DataError(
                f"data.document_mask=true, and which token ends a document of {member.prefix} is unknown",
                why="it has no manifest: `toolkit data prepare` did not make it",
                fix="Prepare it with `toolkit data prepare`, set data.packing to best_fit, which goes by the index, "
                "or set data.document_mask to false.",
            )
        longer = member.index.lengths[member.index.lengths > size]
        if config.data.packing == "best_fit" and len(longer):
            log.info(
                "data.packing=best_fit: %d of %d documents of %s, with %.1f %% of its tokens, are longer than train.seq_length=%d; "
                "they alone are cut",
                len(longer),
                member.index.documents,
                member.prefix,
                100 * int(longer.sum(dtype="int64")) / member.index.tokens,
                size,
            )


def split_sizes(config: RunConfig, *, test_samples: int = 0) -> tuple[int, int, int]:
    """Samples the run draws from train, valid and test: global batches times their size."""
    train = config.train
    return train.steps * train.global_batch_size, (train.eval_steps if train.eval_every else 0) * train.global_batch_size, test_samples


def split_documents(split: tuple[float, ...], documents: int) -> list[range]:
    """Documents of train, valid and test: consecutive, with megatron-core's rounding."""
    total = sum(split)
    edges = [0.0]
    for weight in split:
        edges.append(edges[-1] + weight / total)
    return [range(round(a * documents), round(b * documents)) for a, b in pairwise(edges)]


def _check_splits(config: RunConfig, member: Member) -> None:
    need = config.train.seq_length + 1
    wanted = split_sizes(config)
    for name, samples, documents in zip(SPLITS, wanted, split_documents(config.data.split, member.index.documents), strict=True):
        if samples == 0:
            continue
        tokens = int(member.index.lengths[documents.start : documents.stop].sum(dtype="int64"))
        if tokens < need:
            raise DataError(
                f"the {name} split of {member.prefix} has {tokens} tokens in {len(documents)} of {member.index.documents} documents",
                why=f"one sample of train.seq_length={config.train.seq_length} takes {need}",
                fix="Set data.split to give it more, use more or shorter documents, "
                + ("set train.eval_every to 0, " if name == "valid" else "")
                + "or set a smaller train.seq_length.",
            )
        log.info(
            "%s: %d samples, %.2f times the %d tokens of %s",
            name,
            samples,
            samples * config.train.seq_length / tokens,
            tokens,
            member.prefix,
        )


def build_datasets(config: RunConfig, prepared: PreparedData | GivenData, *, test_samples: int = 0) -> tuple[Any, Any, Any]:
    """Train, valid and test as megatron-core datasets of {"text": int64 [seq_length + 1]}; None
    where no samples are wanted.

    With data.document_mask their samples are those of toolkit.data.documents.

    Valid has eval_steps global batches when train.eval_every is set; test has test_samples. Every
    rank calls it, with or without process groups; raises the same DataError on all of them. Data
    sets that a program gave come back ready to be read.
    """
    if isinstance(prepared, GivenData):
        return *prepared.datasets(config), None
    from toolkit.data import samples

    several = len(prepared.prefixes) > 1
    train, valid, test = samples.build(
        prefixes=prepared.prefixes,
        weights=prepared.weights if several else None,
        # megatron-core parses the string with a pattern that knows no exponents.
        split=",".join(f"{weight:.12f}" for weight in config.data.split),
        seq_length=config.train.seq_length,
        seed=config.run.seed,
        sizes=split_sizes(config, test_samples=test_samples),
        eod=prepared.eod,
        vocab_size=prepared.vocab_size,
        identity=prepared.identity,
        cache=prepared.cache_dir,
        document_mask=config.data.document_mask,
        packing=config.data.packing,
    )
    return train, valid, test
