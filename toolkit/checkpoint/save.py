"""Saving: every rank writes its own files beside the training, and rank 0 makes the checkpoint
count once all are on disk.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.checkpoint.folders import prune, set_aside
from toolkit.checkpoint.manifest import LATEST, Manifest, folder_name, versions, write_manifest
from toolkit.checkpoint.names import group_file, holder, rank_file
from toolkit.config.schema import RunConfig
from toolkit.engine.state import EngineState, generators
from toolkit.errors import CheckpointError
from toolkit.files import FileRecord, sync_folder, write_durably
from toolkit.parallel.agree import everywhere
from toolkit.parallel.layout import Layout
from toolkit.tensors import write_tensors

log = logging.getLogger("toolkit.train")

_POLL_S = 0.05


@dataclass(frozen=True)
class SaveSettings:
    """Where a run saves, and what every manifest of it says; the same on every rank.

    folder: the run's checkpoints; token: tells this run's temporary folders from others'; keep:
    complete checkpoints that pruning leaves; distrusted: names of folders found damaged; facts: the
    manifest's fields that never change.
    """

    folder: Path
    token: str
    keep: int
    distrusted: frozenset[str]
    facts: Mapping[str, Any]


class Saver:
    """One rank's part in a run's saves; all ranks call its methods at the same steps."""

    def __init__(self, config: RunConfig, layout: Layout, state: EngineState, settings: SaveSettings) -> None:
        self.config, self.layout, self.state, self.settings = config, layout, state, settings
        self.rank = dist.get_rank()
        self.owns = holder(layout, self.rank, stage=config.zero.stage) == self.rank
        # what offload to NVMe keeps out of memory must not be copied into it
        self.copying = config.checkpoint.async_save and not state.swapping
        self.copies: dict[tuple[str, str], Tensor] = {}
        self.job: _SaveThread | None = None
        self.last_step = 0

    def save(self, step: int, *, probe: dict[str, Any]) -> float:
        """Take the state after `step` steps; returns the seconds training stood still.

        With async_save the files are written while training goes on. probe: of
        toolkit.checkpoint.resume, known to rank 0.
        """
        started = time.perf_counter()
        self.settle()
        partial = self.settings.folder / f".partial-{folder_name(step)}-{self.settings.token}"
        everywhere(lambda: partial.mkdir(exist_ok=True) if self.rank == 0 else None)
        manifest = Manifest(
            step=step,
            consumed_samples=step * self.config.train.global_batch_size,
            processes=self.layout.world_size,
            probe=probe,
            versions=versions(),
            saved_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            files=[],
            **self.settings.facts,
        )
        self.job = _SaveThread(self.settings, partial, manifest, rank=self.rank, world=self.layout.world_size)
        if self.copying:
            self.job.files = self.copied()
            self.job.start()
        else:
            self.job.write(self._files())
            self.job.start()
            self._raise_together()
        self.last_step = step
        return time.perf_counter() - started

    def commit(self) -> None:
        """Let the checkpoint count from now on: whatever else belongs to its step is on disk.

        Without async_save it counts on return, so that no step is taken which would be lost with it.
        """
        if self.job is not None:
            self.job.committed.set()
            if not self.copying:
                self.job.join()

    @property
    def failed(self) -> bool:
        """Whether this rank's part of a save has gone wrong; when it has on any rank, all must call
        settle().
        """
        return self.job is not None and self.job.error is not None

    def write_seconds(self) -> float | None:
        """On rank 0, once per save: seconds from its start until the checkpoint counted. None
        before, and on other ranks.
        """
        return self.job.take_seconds() if self.job is not None and self.rank == 0 else None

    def settle(self) -> None:
        """Wait until the save in flight is on disk; raises CheckpointError on all ranks when any
        rank's part failed.
        """
        if self.job is None:
            return
        self.job.written.wait()
        self._raise_together()
        self.job.join()
        self._raise_together()

    def _raise_together(self) -> None:
        def check() -> None:
            if self.job is not None and self.job.error is not None:
                raise self.job.error

        try:
            everywhere(check)
        except CheckpointError:
            if self.job is not None:
                self.job.abandoned = True
            raise

    def _files(self) -> Iterator[tuple[str, dict[str, Tensor], dict[str, str]]]:
        """This rank's files one after the other: name, tensors, metadata."""
        yield rank_file(self.rank), generators(), {"numbers": json.dumps(self.state.numbers())}
        for i, part in enumerate(self.state.partitions() if self.owns else ()):
            named = {f.name for f in part.fragments}
            metadata = {
                "numbers": json.dumps(part.numbers),
                "fragments": json.dumps([list(asdict(f).values()) for f in part.fragments]),
                "parameters": json.dumps({n: p for n, p in self.state.parameters.items() if n in named}),
            }
            yield group_file(self.rank, i), part.tensors, metadata

    def copied(self) -> list[tuple[str, dict[str, Tensor], dict[str, str]]]:
        """This rank's files with their tensors in host buffers, which are filled on return; the
        training may then go on.
        """
        files = [self._copied(*one) for one in self._files()]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return files

    def _copied(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[str, dict[str, Tensor], dict[str, str]]:
        """Copy a file's tensors into host buffers, which the saver keeps for the next save."""
        copies = {}
        for key, tensor in tensors.items():
            buffer = self.copies.get((name, key))
            if buffer is None or buffer.shape != tensor.shape:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
                self.copies[name, key] = buffer
            copies[key] = buffer.copy_(tensor, non_blocking=True)
        return name, copies, metadata


class _SaveThread(threading.Thread):
    """One save on one rank: its files and its receipt, and on rank 0 the manifest."""

    def __init__(self, settings: SaveSettings, partial: Path, manifest: Manifest, *, rank: int, world: int) -> None:
        super().__init__(name=f"save-{manifest.step}", daemon=True)
        self.settings, self.partial, self.manifest, self.rank, self.world = settings, partial, manifest, rank, world
        self.files: list[tuple[str, dict[str, Tensor], dict[str, str]]] = []
        self.error: CheckpointError | None = None
        self.written, self.committed = threading.Event(), threading.Event()
        self.abandoned = False
        self.started, self.seconds = time.perf_counter(), 0.0

    def run(self) -> None:
        if not self.written.is_set():
            self.write(iter(self.files))
        self.files = []
        if self.rank == 0 and self.error is None:
            try:
                self._publish()
                self.seconds = time.perf_counter() - self.started
            except Exception as e:  # whatever it is: nobody would see it raised in this thread
                self.error = _failure(e, self.partial)

    def write(self, files: Iterator[tuple[str, dict[str, Tensor], dict[str, str]]]) -> None:
        """Write this rank's files and its receipt; an error is kept for the training thread."""
        try:
            records = [write_tensors(self.partial / name, tensors, metadata=metadata) for name, tensors, metadata in files]
            receipt = json.dumps([r.model_dump() for r in records])
            write_durably(self._receipt(self.rank), receipt)
        except Exception as e:  # the other ranks wait for this one's receipt or its error
            self.error = _failure(e, self.partial)
        finally:
            self.written.set()

    def take_seconds(self) -> float | None:
        seconds, self.seconds = self.seconds, 0.0
        return seconds or None

    def _receipt(self, rank: int) -> Path:
        return self.partial / f"rank-{rank:05d}.receipt"

    def _publish(self) -> None:
        """Wait for all ranks' receipts, give the folder its name, and write the manifest last."""
        settings, receipts = self.settings, [self._receipt(r) for r in range(self.world)]
        # a rank that fails writes none; the training threads notice that together and end the run
        while not (all(r.exists() for r in receipts) and self.committed.is_set()):
            if self.abandoned:
                return
            time.sleep(_POLL_S)
        files = [FileRecord(**one) for r in receipts for one in json.loads(r.read_bytes())]
        for receipt in receipts:
            receipt.unlink()
        sync_folder(self.partial)
        final = settings.folder / folder_name(self.manifest.step)
        if final.exists():
            set_aside(final, token=settings.token)
        self.partial.rename(final)
        sync_folder(settings.folder)
        write_manifest(final, self.manifest.model_copy(update={"files": files}))
        write_durably(settings.folder / LATEST, f"{final.name}\n")
        prune(settings.folder, keep=settings.keep, token=settings.token, distrusted=settings.distrusted - {final.name})


def _failure(error: Exception, folder: Path) -> CheckpointError:
    if not isinstance(error, OSError):
        log.error("saving failed", exc_info=error)
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    where = getattr(error, "filename", None) or folder
    return CheckpointError(
        f"saving to {where} failed on host {socket.gethostname()}",
        why=reason[:1].lower() + reason[1:],
        fix="Checkpoints saved before are untouched. Make room or set checkpoint.dir to another disk, and start again to go on from there.",
    )
