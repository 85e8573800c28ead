"""A write that fails leaves the old file whole, and what a killed writer leaves is gone when the
next one comes.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from toolkit.files import Partial, replacing, write_durably

OLD, NEW = b"old", b"new" * 1000

WRITER = """
import sys, time
from pathlib import Path
from toolkit.files import Partial
with Partial(Path(sys.argv[1])) as p:
    (p.folder / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(600)
"""


def other_writer(final: Path) -> subprocess.Popen[str]:
    """Another process, once it writes."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(final)], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def test_only_what_is_abandoned_is_removed(tmp_path: Path) -> None:
    final = tmp_path / "new" / "of [this]"  # a name that a pattern would read otherwise
    killed, alive, neighbour = other_writer(final), other_writer(final), other_writer(tmp_path / "new" / "of [this] too")
    killed.kill()
    killed.wait()
    (tmp_path / "new" / ".partial-of [this]-0000").mkdir()  # without a lock: just being made
    neighbour.kill()
    neighbour.wait()
    assert len(list(final.parent.iterdir())) == 4
    with Partial(final) as partial:
        (partial.folder / "whole").write_text("x")
        assert len(list(final.parent.iterdir())) == 4, "one has gone, one has come"
        assert alive.poll() is None and len(list(final.parent.rglob("half"))) == 2
        partial.publish()
    assert [p.name for p in final.iterdir()] == ["whole"]
    alive.kill()
    alive.wait()


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Partial(tmp_path / "final"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@contextmanager
def a_full_disk(_: Path) -> Iterator[None]:
    """No file of this process may grow beyond 1000 bytes; the writer sees EFBIG, as it would see ENOSPC."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def a_closed_folder(folder: Path) -> Iterator[None]:
    """As a user without rights, since root may write anywhere."""
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@contextmanager
def a_sync_that_fails(_: Path) -> Iterator[None]:
    real = os.fsync

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.fsync = fail
    try:
        yield
    finally:
        os.fsync = real


def by_path(path: Path) -> None:
    """As a library writes that wants a path."""
    with replacing(path) as part:
        part.write_bytes(NEW)


FAULTS = [a_full_disk, a_closed_folder, a_sync_that_fails]
WRITERS: dict[str, Callable[[Path], None]] = {
    "bytes": lambda path: write_durably(path, NEW),
    "text": lambda path: write_durably(path, NEW.decode()),
    "path": by_path,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_that_fails_leaves_the_old_file(writer: str, fault: Callable[[Path], Iterator[None]]) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to other users
        os.chmod(name, 0o755)
        path = Path(name) / "file.json"
        path.write_bytes(OLD)
        with fault(Path(name)), pytest.raises(OSError):  # type: ignore[attr-defined]
            WRITERS[writer](path)
        assert path.read_bytes() == OLD
        assert [p.name for p in path.parent.iterdir()] == ["file.json"], "no half-written file is left"
        WRITERS[writer](path)
        assert path.read_bytes() == NEW and len(list(path.parent.iterdir())) == 1


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_bytes(NEW)
        raise KeyboardInterrupt
    assert path.read_bytes() == OLD and list(tmp_path.iterdir()) == [path]


def test_the_name_is_given_after_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "file", []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append((os.fstat(descriptor).st_size, path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_durably(path, NEW)
    assert seen == [(len(NEW), False)] and path.read_bytes() == NEW
