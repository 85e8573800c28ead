"""Micro-batches for one data-parallel rank, read ahead by worker processes."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data._utils import signal_handling

from toolkit.data.documents import bounds_of
from toolkit.errors import DataError, MachineError, ToolkitError
from toolkit.parallel.layout import Layout

log = logging.getLogger(__name__)

_READ_AHEAD = 4  # micro-batches per worker
_SIGTERM_GRACE = 60  # seconds a worker outlives a SIGTERM
_START_S = 15.0  # seconds in which forked workers must run Python; they take milliseconds
_TRIES = 4
ON_HOST = ("bounds",)  # entries that the host reads, which stay in its memory
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def sample_ids(*, samples: int, layout: Layout, dp_rank: int, global_batch_size: int, consumed_samples: int = 0) -> Iterator[list[int]]:
    """Sample ids of each micro-batch of a rank: global batch k is [kG, (k+1)G), and rank r's share
    its r-th of dp equal slices.

    Stops before the first global batch that the samples do not fill.
    """
    share = global_batch_size // layout.dp
    for start in range(consumed_samples, samples - global_batch_size + 1, global_batch_size):
        first = start + dp_rank * share
        for begin in range(first, first + share, layout.micro_batch_size):
            yield list(range(begin, begin + layout.micro_batch_size))


class _Ids(Sampler[list[int]]):
    def __init__(self, **args: Any) -> None:
        self._args = args

    def __iter__(self) -> Iterator[list[int]]:
        return sample_ids(**self._args)


Rows = np.ndarray | dict[str, np.ndarray] | ToolkitError


def _collate(rows: list[Any]) -> Rows:
    """A micro-batch: text as int32 [b, s+1], or what a data set of the user's own gives, each entry
    [b, …]; or a sample's error.

    An array goes through the pipe; a tensor would go through /dev/shm, slower at these sizes and often small.
    """
    if error := next((row for row in rows if isinstance(row, ToolkitError)), None):
        return error
    if "text" in rows[0]:
        return np.stack([row["text"] for row in rows], dtype=np.int32, casting="same_kind")
    try:
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    except (ValueError, KeyError) as error:
        return DataError("samples of one micro-batch differ in their entries or shapes", why=str(error), fix="Give all samples the same.")


def _end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, of the given process id, is gone (Linux;
    elsewhere nothing).

    A killed parent cannot tell its helpers, and a helper that holds its sockets keeps other ranks waiting.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the line above.
    if os.getppid() != parent:
        os._exit(1)


def _start_worker(_: int, *, parent: int, started: int) -> None:
    _end_with_parent(parent)
    # A scheduler's SIGTERM reaches every process, but the rank still needs its data up to the end
    # of its step.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SIGTERM_GRACE))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(started, b"x")


def _started(loader: DataLoader[Rows], pipe: int) -> Iterator[Rows]:
    """The loader's iterator, with workers that are known to run; MachineError where they do not.

    A fork copies the interpreter's lock over its list of threads as it is. Python 3.11 waits for it
    in the child before it makes it anew, so a child hangs for good when a thread of gloo's was just
    entering or leaving Python. It is then killed and forked again.
    """
    for _ in range(_TRIES):
        with warnings.catch_warnings():
            # Python 3.12 warns of forking with threads about; what the workers run takes none of their locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            rows: Any = iter(loader)
        missing, end = loader.num_workers, time.monotonic() + _START_S
        while missing and select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            missing -= len(os.read(pipe, missing))
        if not missing:
            return rows  # type: ignore[no-any-return]
        log.warning("%d of %d reading processes hang since they were forked; starting them again", missing, loader.num_workers)
        if rows._worker_pids_set:  # torch would report the next ones as killed
            signal_handling._remove_worker_pids(id(rows))
            rows._worker_pids_set = False
        for worker in rows._workers:
            worker.kill()
            worker.join()
        del rows
        while select.select([pipe], [], [], 0)[0]:
            os.read(pipe, 1 << 12)
    raise MachineError(
        f"{loader.num_workers} reading processes do not start", fix="Set data.workers=0, which reads within the training process."
    )


class Batches(Iterator[dict[str, torch.Tensor]]):
    """Iterator over micro-batches; starts reading at once, and close() ends its workers.

    Raises DataError for a sample of the user's own data set that cannot be used.
    """

    def __init__(self, rows: Iterator[Rows], *, apart: bool = False) -> None:
        self._apart = apart
        self._pin = torch.cuda.is_available()
        self._rows: Iterator[Rows] | None = rows
        # Before multiprocessing's own exit handler, which would wait for workers that wait for work.
        atexit.register(self.close)

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._rows is None:
            raise StopIteration
        rows = next(self._rows)
        if isinstance(rows, ToolkitError):
            raise rows
        if isinstance(rows, dict):
            batch = {name: torch.from_numpy(array) for name, array in rows.items()}
            batch |= {name: batch[name].long() for name in ("tokens", "labels", "positions") if name in batch}
            batch |= {"bounds": torch.from_numpy(bounds_of(rows["positions"]))} if self._apart else {}
        else:
            text = torch.from_numpy(rows).long()
            batch = {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}
        return {name: tensor if name in ON_HOST else tensor.pin_memory() for name, tensor in batch.items()} if self._pin else batch

    def close(self) -> None:
        """End the workers; no more batches follow."""
        self._rows = None
        atexit.unregister(self.close)


def batches(
    dataset: Any,
    *,
    layout: Layout,
    dp_rank: int,
    global_batch_size: int,
    consumed_samples: int = 0,
    workers: int = 0,
    seed: int = 0,
    apart: bool = False,
) -> Batches:
    """Micro-batches {"tokens", "labels"} of int64 [micro_batch_size, seq_length] for one
    data-parallel rank, in step order.

    apart: data.document_mask; they then have "positions" (int64), "loss_mask" and "bounds" too, see
    toolkit.data.documents.

    dataset: one of build_datasets, or the user's own, whose other entries come along;
    consumed_samples: samples of all ranks already trained on; workers: reading processes (0: none);
    seed: of the loader's own generator, so that torch's global one is left alone. Which samples a
    step sees depends on the step only. With CUDA the batches lie in pinned memory. Raises DataError
    when the global batch does not divide.
    """
    slice_size = layout.dp * layout.micro_batch_size
    if global_batch_size % slice_size:
        raise DataError(
            f"train.global_batch_size={global_batch_size} is not a multiple of {slice_size}",
            why=f"{layout.dp} data-parallel ranks take micro-batches of {layout.micro_batch_size}",
            fix=f"Set it to a multiple of {slice_size}.",
        )
    ids = _Ids(samples=len(dataset), layout=layout, dp_rank=dp_rank, global_batch_size=global_batch_size, consumed_samples=consumed_samples)
    read = partial(
        DataLoader[Rows],
        dataset,
        batch_sampler=ids,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(seed),
    )
    if not workers:
        return Batches(iter(read()), apart=apart)
    pipe, started = os.pipe()
    try:
        # fork: a worker needs no import and shares the mapped files; it never touches process
        # groups or the device.
        loader = read(
            multiprocessing_context="fork",
            prefetch_factor=_READ_AHEAD,
            worker_init_fn=partial(_start_worker, parent=os.getpid(), started=started),
        )
        return Batches(_started(loader, pipe), apart=apart)
    finally:
        os.close(pipe)
        os.close(started)
