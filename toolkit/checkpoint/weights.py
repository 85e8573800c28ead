"""Writing a weights-only checkpoint: whole tensors under global names, streamed, and complete only
once its manifest is there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from toolkit.checkpoint.identity import layout_of, model_identity
from toolkit.checkpoint.manifest import Manifest, versions, write_manifest
from toolkit.checkpoint.names import weights_file
from toolkit.config.load import saved_config
from toolkit.config.schema import RunConfig
from toolkit.errors import CheckpointError
from toolkit.files import FileRecord, Partial, write_durably
from toolkit.parallel.layout import Layout
from toolkit.tensors import Rows, write_tensors

SHARD_BYTES = 128 << 20


def weights_manifest(config: RunConfig, *, step: int = 0, consumed_samples: int = 0) -> Manifest:
    """The manifest of a config's weights (model.vocab_size must be set; train.precision says what
    they are stored as), without files yet.

    step, consumed_samples: the training they stand for, where it is known.
    """
    one = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "sequence_parallel": False}
    plain = config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=one),
            "zero": config.zero.model_copy(update={"stage": 0, "offload_optimizer": "none", "offload_param": "none"}),
        }
    )
    return Manifest(
        step=step,
        consumed_samples=consumed_samples,
        processes=1,
        layout=layout_of(plain, Layout()),
        identity=model_identity(config),
        probe={},
        config=saved_config(config),
        versions=versions(),
        saved_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        files=[],
        weights_only=True,
    )


class WeightsWriter:
    """`with WeightsWriter(folder, manifest) as w: w.add(name, tensor) …`; folder counts as a
    checkpoint once the block has ended well.

    Tensors are whole, in their stored dtype, the vocabulary's rows padded as in the model; they
    must not change after add(). Shards of up to shard_bytes (a larger tensor has one of its own)
    are hashed and written by `threads` threads while the caller makes the next ones; add() waits
    while more than threads x shard_bytes are being written. An error or an exception in the block
    leaves nothing behind. Raises CheckpointError where the folder exists or cannot be written.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, shard_bytes: int = SHARD_BYTES, threads: int = 2) -> None:
        self.folder, self.manifest, self.shard_bytes = folder, manifest, shard_bytes
        self.at_once = threads * shard_bytes
        self.partial = Partial(folder)
        self.shard: dict[str, Tensor | Rows] = {}
        self.writing: list[tuple[int, Future[FileRecord]]] = []
        self.records: list[FileRecord] = []
        self.names: set[str] = set()
        self.files: dict[str, bytes] = {}
        self.count = 0
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="weights")

    def __enter__(self) -> WeightsWriter:
        if self.folder.exists():
            raise CheckpointError(
                f"{self.folder} exists", why="a checkpoint is never written over", fix="Name a folder that does not exist."
            )
        try:
            self.partial.__enter__()
        except OSError as e:
            raise self._failure(e) from None
        return self

    def add(self, name: str, tensor: Tensor | Rows) -> None:
        """Take a whole tensor under its global name."""
        if name in self.names:
            raise ValueError(f"{name} was added before")
        self.names.add(name)
        if self.shard and _bytes(self.shard) + tensor.nbytes > self.shard_bytes:
            self._write()
        self.shard[name] = tensor
        if _bytes(self.shard) >= self.shard_bytes:
            self._write()

    def add_file(self, name: str, data: bytes) -> None:
        """Add a small file; the manifest lists it like the others."""
        self.files[name] = data

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                self._write()
                self._settle(0)
                self._publish()
        finally:
            self.threads.shutdown(cancel_futures=True)
            self.partial.__exit__()

    def _publish(self) -> None:
        try:
            for name, data in self.files.items():
                write_durably(self.partial.folder / name, data)
                self.records.append(FileRecord(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
            self.partial.publish()
            write_manifest(self.folder, self.manifest.model_copy(update={"files": self.records}))
        except OSError as e:
            raise self._failure(e) from None

    def _write(self) -> None:
        if self.shard:
            shard, path = self.shard, self.partial.folder / weights_file(self.count)
            self.shard, self.count = {}, self.count + 1
            size = _bytes(shard)
            self._settle(max(0, self.at_once - size))
            self.writing.append((size, self.threads.submit(write_tensors, path, shard, metadata={"format": "pt"})))

    def _settle(self, limit: int) -> None:
        """Wait, oldest first, until no more than `limit` bytes are being written."""
        while self.writing and (limit == 0 or sum(size for size, _ in self.writing) > limit):
            _, future = self.writing.pop(0)
            try:
                self.records.append(future.result())
            except OSError as e:
                raise self._failure(e) from None

    def _failure(self, error: OSError) -> CheckpointError:
        reason = error.strerror or str(error)
        return CheckpointError(
            f"{self.folder} cannot be written",
            why=reason[:1].lower() + reason[1:],
            fix="Make room, or name a folder that you may write to.",
        )


def _bytes(shard: Mapping[str, Tensor | Rows]) -> int:
    return sum(t.nbytes for t in shard.values())
