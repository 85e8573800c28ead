"""Encoding one shard of text, in this process or in helpers that read their work from a pipe."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.tokenizer import TextTokenizer, spread
from toolkit.errors import DataError
from toolkit.files import write_durably


@dataclass
class Shard:
    """Consecutive documents; bytes: of their UTF-8 text; sha256: over the text and the borders."""

    number: int
    texts: list[str] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""


def part_path(work: Path, number: int, suffix: str) -> Path:
    """File of one encoded shard: .bin ids, .npz lengths and counts, .json the record that is written last."""
    return work / f"part-{number:06d}{suffix}"


def id_dtype(vocab_size: int) -> type[np.integer]:
    """Type of stored ids, as megatron-core's DType.optimal_dtype chooses it."""
    return np.uint16 if vocab_size < 65500 else np.int32


def encode_shard(shard: Shard, *, tok: TextTokenizer, work: Path) -> dict[str, Any]:
    """Encode a shard into its part files and return its record. Raises DataError for a document the
    format cannot hold.
    """
    fast = tok.fast_agrees(spread(shard.texts))
    ids = tok.encode_batch(shard.texts, fast=fast)
    lengths = np.array([len(i) + 1 for i in ids], dtype=np.int64)
    if lengths.max() > np.iinfo(np.int32).max:
        raise DataError(
            f"a document has {lengths.max()} tokens", why="the .idx format counts up to 2147483647", fix="Split it into several documents."
        )
    flat = np.empty(int(lengths.sum()), dtype=id_dtype(tok.vocab_size))
    position = 0
    for one in ids:
        flat[position : position + len(one)] = one
        flat[position + len(one)] = tok.eod
        position += len(one) + 1
    write_durably(part_path(work, shard.number, ".bin"), flat.tobytes())
    arrays = io.BytesIO()
    np.savez(arrays, lengths=lengths, counts=np.bincount(flat, minlength=tok.vocab_size))
    write_durably(part_path(work, shard.number, ".npz"), arrays.getvalue())
    record = {
        "documents": len(ids),
        "tokens": position,
        "text_sha256": shard.sha256,
        "encoder": "gigatoken" if fast else "tokenizers" if tok.json is not None else "bytes",
        "characters": sum(map(len, shard.texts)),
        "bytes": shard.bytes,
    }
    write_durably(part_path(work, shard.number, ".json"), json.dumps(record))
    return record


class Helpers:
    """A few processes that encode shards; they end when this one does, since their pipe closes.

    Plain subprocesses: multiprocessing's spawn runs the caller's main module again in every helper,
    and a fork copies its locks.
    """

    def __init__(self, count: int, *, tok: TextTokenizer, work: Path) -> None:
        env = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        # Each helper is one of many: a thread pool inside each would only fight for the same cores.
        env["TOKENIZERS_PARALLELISM"] = "false"
        command = [sys.executable, "-m", "toolkit.data.encode"]
        self._all = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) for _ in range(count)]
        self._free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._first = pickle.dumps({"tok": tok, "work": work})
        self._fresh = {p.pid for p in self._all}
        for process in self._all:
            self._free.put(process)
        self._threads = ThreadPoolExecutor(count)

    def submit(self, shard: Shard) -> Future[dict[str, Any]]:
        """Encode a shard in the next free helper; the future raises DataError when the helper fails
        or is killed.
        """
        return self._threads.submit(self._encode, shard)

    def close(self) -> None:
        """Drop what has not begun and end the helpers."""
        for process in self._all:
            process.terminate()
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]

    def _encode(self, shard: Shard) -> dict[str, Any]:
        process = self._free.get()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            line = b""
            with contextlib.suppress(OSError):  # a broken pipe shows as no answer
                if process.pid in self._fresh:
                    self._fresh.discard(process.pid)
                    process.stdin.write(self._first)
                pickle.dump(shard, process.stdin)
                process.stdin.flush()
                line = process.stdout.readline()
        finally:
            self._free.put(process)
        if not line:
            raise DataError(
                f"an encoding process ended with code {process.wait()}",
                why="killed, most often because the machine ran out of memory, or by the error above",
                fix="Try fewer --workers; finished shards are kept.",
            )
        answer = json.loads(line)
        if "error" in answer:
            raise DataError(**answer["error"])
        return dict(answer["record"])


def _serve() -> None:
    """Run as a helper: read shards from stdin until it closes, and write one line of JSON for each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    setup = pickle.load(sys.stdin.buffer)
    for shard in _frames():
        try:
            answer: dict[str, Any] = {"record": encode_shard(shard, **setup)}
        except DataError as e:
            answer = {"error": {"what": e.what, "why": e.why, "fix": e.fix}}
        except OSError as e:
            answer = {
                "error": {"what": f"{setup['work']} cannot be written", "why": str(e), "fix": "Choose another place, or free space there."}
            }
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _frames() -> Iterator[Shard]:
    while True:
        try:
            yield pickle.load(sys.stdin.buffer)
        except EOFError:
            return


if __name__ == "__main__":
    with contextlib.suppress(EOFError):
        _serve()
