"""Build locks of JIT extensions, made by torch's own builder."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from toolkit.cluster.locks import check_extension_locks, extension_folders
from toolkit.errors import MachineError

BUILD = """
import sys
from torch.utils.cpp_extension import load
load(name="slow", sources=[sys.argv[1]], is_python_module=False)
"""


def build(folder: Path, monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> subprocess.Popen[bytes]:
    """Start a real build of the extension `slow` with a compiler that takes that long, and return
    once it compiles.
    """
    source, compiler = folder / "slow.cpp", folder / "slow-c++"
    source.write_text("int answer() { return 42; }\n")
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *slow.cpp*) sleep {seconds};; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(source)])
    while not any(_compiles(p) for p in psutil.Process(process.pid).children(recursive=True)):
        assert process.poll() is None, "the build ended before it compiled"
        time.sleep(0.05)
    return process


def _compiles(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
        # torch asks the compiler for its version, before it takes the lock
        return any(w.endswith("slow-c++") for w in words[:2]) and any(w.endswith("slow.cpp") for w in words)
    except psutil.Error:
        return False


def kill_tree(pid: int) -> None:
    # the builder first: one that sees its compiler die removes the lock
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in tree:
        process.kill()
    psutil.wait_procs(tree, timeout=10)


def test_the_lock_of_a_killed_build_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = build(tmp_path, monkeypatch, seconds=60)
    kill_tree(process.pid)
    process.wait()
    lock = tmp_path / "extensions" / "slow" / "lock"
    assert lock.exists(), "torch keeps its lock elsewhere now"
    with pytest.raises(MachineError, match=f"Delete {lock}"):
        check_extension_locks(grace_s=1)
    check_extension_locks({"cpu_adam"}, grace_s=1)  # somebody else's lock is none of this run's business
    lock.unlink()
    check_extension_locks(grace_s=1)


def test_a_build_at_work_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    process = build(tmp_path, monkeypatch, seconds=10)
    check_extension_locks(grace_s=5)
    assert process.wait(60) == 0
    assert (tmp_path / "extensions" / "slow" / "slow.so").exists()
    assert [r.message for r in caplog.records if "compiles it" in r.message]


def test_a_fresh_lock_gets_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    unlock = threading.Timer(1.0, lock.unlink)
    unlock.start()
    check_extension_locks(grace_s=30)
    unlock.join()
    assert not lock.exists()


def test_a_lock_dated_in_the_future_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() + 3600, time.time() + 3600))
    with pytest.raises(MachineError, match="async_io"):
        check_extension_locks(grace_s=1)


def test_the_folder_is_the_one_torch_builds_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built_in = Path(cpp_extension._get_build_directory("slow", verbose=False))
    assert [f.resolve() for f in extension_folders()] == [built_in.parent.resolve()]


def test_a_word_is_said_before_an_extension_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with caplog.at_level(logging.INFO):
        check_extension_locks({"cpu_adam"})
        assert [r.message for r in caplog.records] == ["compiling DeepSpeed's extension cpu_adam, once on this machine: about a minute"]
        caplog.clear()
        (tmp_path / "cpu_adam").mkdir()
        (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
        check_extension_locks({"cpu_adam"})
        check_extension_locks()
    assert caplog.records == []
