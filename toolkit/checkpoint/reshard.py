"""Reshard a checkpoint offline: no model, no process groups, and a few buffers of memory per worker."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.checkpoint.identity import same_degrees
from toolkit.checkpoint.manifest import Manifest, folder_name, verify_files, write_manifest
from toolkit.checkpoint.names import group_file, rank_file
from toolkit.checkpoint.target import Target
from toolkit.checkpoint.whole import WholeCheckpoint
from toolkit.config.load import saved_config
from toolkit.engine.partitions import Cut
from toolkit.errors import CheckpointError
from toolkit.files import FileRecord, Partial
from toolkit.tensors import read_tensors, write_stream, write_tensors

_BUFFER = 1 << 22  # elements read, hashed and written at a time

Progress = Callable[[int], None]


class _OutputFile(NamedTuple):
    """One file to write: partition `group` of a rank; with group None, the rank's generators and counters."""

    rank: int
    group: int | None
    elements: int


def reshard(source: Path, out: Path, target: Target, *, workers: int, progress: Progress = lambda _: None) -> Path:
    """Write the checkpoint `source` as one that `target`'s processes would have saved; returns its
    folder, out/step-….

    The source's checksums are compared first. progress is called with bytes done: half of them
    verifying, half writing. Each of the `workers` processes takes a few buffers of memory, whatever
    the size of the model. Raises CheckpointError naming the file where the source is damaged or the
    disk fails, and then leaves nothing behind.
    """
    with WholeCheckpoint(source) as whole:
        manifest = whole.manifest
        jobs = [
            _OutputFile(rank, i, cut.numel * len(whole.keys(cut.members[0])))
            for rank in target.holders
            for i, cut in enumerate(target.cuts(whole, rank))
        ]
    jobs = sorted(jobs, key=lambda j: -j.elements) + [_OutputFile(rank, None, 0) for rank in range(target.layout.world_size)]
    made = _missing_parents(out)
    final = out / folder_name(manifest.step)
    if final.exists():
        raise CheckpointError(f"{final} exists", why="a checkpoint is never written over", fix="Name another folder.")
    try:
        with Partial(final) as partial:
            with _Workers(workers, source, partial.folder, target, progress) as run:
                run.all(_verify, sorted(manifest.files, key=lambda f: -f.bytes))
                records = run.all(_write, jobs)
            partial.publish()
        write_manifest(final, _manifest(manifest, target, records))
    except BaseException as e:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(e, OSError):
            reason = (e.strerror or str(e)).lower()
            raise CheckpointError(f"{e.filename or out} cannot be written", why=reason, fix="Make room, or name another folder.") from None
        raise
    return final


def work_bytes(source: Manifest) -> int:
    """About what reshard() tells its progress in all, in bytes."""
    return 2 * sum(f.bytes for f in source.files)


def _manifest(source: Manifest, target: Target, files: Sequence[FileRecord]) -> Manifest:
    return source.model_copy(
        update={
            "layout": target.cut,
            "processes": target.layout.world_size,
            "config": saved_config(target.config),
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": sorted(files, key=lambda f: f.name),
        }
    )


def _missing_parents(folder: Path) -> list[Path]:
    """What mkdir(parents=True) will make, innermost first."""
    return [p for p in (folder, *folder.parents) if not p.exists()]


# -- workers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Context:
    """What a worker keeps between jobs."""

    source: Path
    partial: Path
    target: Target
    count: Progress
    opened: list[WholeCheckpoint]

    @property
    def whole(self) -> WholeCheckpoint:
        if not self.opened:
            self.opened.append(WholeCheckpoint(self.source))
        return self.opened[0]


class _Workers:
    """Runs jobs in processes, or with one worker in this one, and adds up what they report."""

    def __init__(self, count: int, source: Path, partial: Path, target: Target, progress: Progress) -> None:
        self.progress, self.seen = progress, 0
        self.context = _Context(source, partial, target, progress, [])
        self.pool: ProcessPoolExecutor | None = None
        if count > 1:
            # a server that has imported torch once forks the workers: a fork of this process would
            # copy the locks of its threads
            context = mp.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            self.done = context.Value("Q", 0)
            self.pool = ProcessPoolExecutor(count, context, _start, (self.done, source, partial, target))

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        for whole in self.context.opened:
            whole.close()

    def all(self, action: Callable[[_Context, Any], FileRecord | None], jobs: Sequence[Any]) -> list[FileRecord]:
        """Results of a module-level action over jobs; the first error ends it."""
        if self.pool is None:
            return [r for job in jobs if (r := action(self.context, job))]
        waiting: set[Future[FileRecord | None]] = {self.pool.submit(_act, action, job) for job in jobs}
        results = []
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                results += [r for future in ended if (r := future.result())]
                now = self.done.value
                self.progress(now - self.seen)
                self.seen = now
        except BrokenProcessPool:
            raise CheckpointError(
                "a worker died", why="the system may have ended it for want of memory", fix="Set fewer --workers."
            ) from None
        return results


_of_this_process: list[_Context] = []


def _start(done: Any, source: Path, partial: Path, target: Target) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)

    def count(n: int) -> None:
        with done.get_lock():
            done.value += n

    _of_this_process.append(_Context(source, partial, target, count, []))


def _end_with_parent() -> None:
    """End this worker when the command is gone: a killed command cannot tell its workers."""
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _act(action: Callable[[_Context, Any], FileRecord | None], job: Any) -> FileRecord | None:
    return action(_of_this_process[0], job)


def _verify(context: _Context, record: FileRecord) -> None:
    if problem := verify_files(context.source, [record], progress=context.count):
        raise CheckpointError(problem, why="a damaged checkpoint is not resharded", fix="Restore the file, or name another checkpoint.")


def _write(context: _Context, job: _OutputFile) -> FileRecord:
    if job.group is None:
        return _write_rank(context, job.rank)
    whole, target = context.whole, context.target
    cut = target.cuts(whole, job.rank)[job.group]
    first = whole.parameter(cut.members[0])
    step, numbers = whole.numbers["step"] if first.counted else None, {}
    entries: dict[str, tuple[torch.dtype, list[int], Iterator[Tensor]]] = {
        key: (entry.dtype, [cut.numel], _flat(context, cut, key, rank=job.rank)) for key, entry in first.keys.items()
    }
    if step is not None and target.config.zero.offload_optimizer != "none":
        numbers["step"] = step  # DeepSpeed's CPU Adam keeps its step count in Python, torch's Adam in a tensor
    elif step is not None:
        entries["step"] = (torch.float32, [], iter([torch.tensor(float(step))]))
    named = {f.name for f in cut.fragments}
    metadata = {
        "numbers": json.dumps(numbers),
        "fragments": json.dumps([list(astuple(f)) for f in cut.fragments]),
        "parameters": json.dumps(target.parameters(whole, named)),
    }
    return write_stream(context.partial / group_file(job.rank, job.group), entries, metadata=metadata)


def _flat(context: _Context, cut: Cut, key: str, *, rank: int) -> Iterator[Tensor]:
    """A flat tensor of a partition, a buffer at a time; padding is zero, as in DeepSpeed's."""
    whole, layout = context.whole, context.target.layout
    tp = layout.coordinates(rank).tp
    buffer, at = torch.empty(min(_BUFFER, max(1, cut.numel))), 0

    def zeros(n: int) -> Iterator[Tensor]:
        while n > 0:
            part = buffer[:n].zero_()
            n -= part.numel()
            yield part

    for f in cut.fragments:
        yield from zeros(f.at - at)
        for start in range(0, f.count, _BUFFER):
            part = buffer[: min(_BUFFER, f.count - start)]
            whole.read_into(part, f.name, key, tp=layout.tp, rank=tp, start=f.start + start)
            context.count(part.nbytes)
            yield part
        at = f.at + f.count
    yield from zeros(cut.numel - at)


def _write_rank(context: _Context, rank: int) -> FileRecord:
    whole, target, source = context.whole, context.target, context.whole.manifest.layout
    # ranks that keep their place keep their generators; otherwise the run seeds them anew
    generators = read_tensors(context.source / rank_file(rank))[0] if same_degrees(target.cut, source) else {}
    same_precision = source["train.precision"] == target.config.train.precision
    numbers = {"counters": whole.numbers["counters"], "loss_scaler": whole.numbers["loss_scaler"] if same_precision else {}}
    return write_tensors(context.partial / rank_file(rank), generators, metadata={"numbers": json.dumps(numbers)})
