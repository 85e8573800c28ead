"""What a run lacks is said before any process starts: packages, a compiler, libaio, a disk that can
be written.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.cluster.needs import check_needs
from toolkit.config.load import parse_config
from toolkit.config.schema import RunConfig
from toolkit.errors import ConfigError, MachineError

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}


def config(**sections: Any) -> RunConfig:
    return parse_config({"model": MODEL, **sections})


def nvme(path: Path) -> RunConfig:
    return config(zero={"stage": 3, "offload_param": "nvme", "nvme_path": str(path)})


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on its PATH, and packages only where the test puts them."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CC", "CXX", "CFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_plain_run_needs_nothing(bare: Path) -> None:
    check_needs(config())


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_monitor_without_its_package(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "editable" not in repr(f)])
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(MachineError, match=rf"log.{name}=true needs the package {name}.*pip install {name}"):
        check_needs(config(log={name: True}))
    (tmp_path / f"{name}.py").touch()
    check_needs(config(log={name: True}))


def test_a_folder_for_nvme_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "swap", Path("/proc/swap")):
        with pytest.raises(ConfigError, match=f"zero.nvme_path={path} cannot be written to: .*Set it to a folder on a local disk"):
            check_needs(nvme(path))


def test_offload_without_a_compiler(bare: Path) -> None:
    with pytest.raises(MachineError, match=r"zero.offload_optimizer=cpu needs a C\+\+ compiler.*cpu_adam"):
        check_needs(config(zero={"offload_optimizer": "cpu"}))


COMPILER = """#!/bin/sh
case "$*" in *-laio*) exit {code};; esac
exit 0
"""


@pytest.mark.parametrize("code", [0, 1])
def test_nvme_asks_the_compiler_for_libaio(bare: Path, code: int) -> None:
    """A compiler that finds libaio (0), and one that does not (1)."""
    for name in ("cc", "c++"):
        (bare / "bin" / name).write_text(COMPILER.format(code=code))
        (bare / "bin" / name).chmod(0o755)
    if code == 0:
        check_needs(nvme(bare / "swap"))
        return
    with pytest.raises(MachineError, match=r"zero.offload_param=nvme needs libaio.*Install libaio-dev"):
        check_needs(nvme(bare / "swap"))


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_real_compiler_agrees_with_the_headers(tmp_path: Path) -> None:
    if Path("/usr/include/libaio.h").exists():
        check_needs(nvme(tmp_path))
    else:
        with pytest.raises(MachineError, match="libaio"):
            check_needs(nvme(tmp_path))
