"""What a run needs of this machine beside its processes, checked before any of them starts: a
compiler, libaio, a disk, packages.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from toolkit.config.schema import RunConfig
from toolkit.errors import ConfigError, MachineError, ToolkitError

MONITORS = {"log.tensorboard": "tensorboard", "log.wandb": "wandb"}
# what DeepSpeed's own check compiles: a program that calls libaio
LIBAIO = "#include <libaio.h>\nint main(void) { return io_submit(0, 0, 0); }\n"


def check_needs(config: RunConfig) -> None:
    """Raise MachineError or ConfigError for what the run would stumble over minutes later, with
    what to install or set.
    """
    for check in _checks(config):
        check()


def check_generation_on_nvme(path: Path) -> None:
    """The same for a generation whose weights wait in files in a folder."""
    _check_folder(path, asked=f"--nvme-path {path}")
    _check_compiler("--offload zero-nvme", "async_io")
    _check_libaio("--offload zero-nvme")


def unmet(config: RunConfig) -> list[ToolkitError]:
    """All that check_needs would raise, one after the other."""
    errors = []
    for check in _checks(config):
        try:
            check()
        except ToolkitError as error:
            errors.append(error)
    return errors


def needed_extensions(config: RunConfig) -> list[str]:
    """DeepSpeed's extensions that the run compiles at its first use."""
    zero = config.zero
    return [
        *(["cpu_adam"] if zero.offload_optimizer != "none" else []),
        *(["async_io"] if "nvme" in (zero.offload_optimizer, zero.offload_param) else []),
    ]


def _checks(config: RunConfig) -> Iterator[Callable[[], None]]:
    for key, package in MONITORS.items():
        section, name = key.split(".")
        if getattr(getattr(config, section), name):
            yield partial(_check_monitor, key, package)
    zero = config.zero
    devices = {"zero.offload_optimizer": zero.offload_optimizer, "zero.offload_param": zero.offload_param}
    on_nvme = [key for key, device in devices.items() if device == "nvme"]
    if zero.offload_optimizer != "none":
        yield partial(_check_compiler, f"zero.offload_optimizer={zero.offload_optimizer}", "cpu_adam")
    if on_nvme:
        yield partial(_check_folder, zero.nvme_path, asked=f"zero.nvme_path={zero.nvme_path}")
        yield partial(_check_compiler, f"{on_nvme[0]}=nvme", "async_io")
        yield partial(_check_libaio, f"{on_nvme[0]}=nvme")


def _check_monitor(key: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MachineError(
            f"{key}=true needs the package {package}, which is not installed",
            fix=f"Install it (pip install {package}), or set {key} to false.",
        )


def _check_folder(path: Path | None, *, asked: str) -> None:
    """The folder for NVMe can be made and written to."""
    try:
        folder = Path(path or "").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as e:
        raise ConfigError(
            f"{asked} cannot be written to",
            why=(e.strerror or str(e)).lower(),
            fix="Set it to a folder on a local disk that you may write to.",
        ) from None


def _check_compiler(asked: str, extension: str) -> None:
    if _compiler("CXX", "c++", "g++") is None and not any(compiled_with_deepspeed(extension)):
        raise MachineError(
            f"{asked} needs a C++ compiler, and there is none on the PATH",
            why=f"DeepSpeed compiles its extension {extension} at first use",
            fix="Install one (g++), or set it to none.",
        )


def _check_libaio(asked: str) -> None:
    if any(compiled_with_deepspeed("async_io")):
        return
    compiler = _compiler("CC", "cc", "gcc")
    flags = [*shlex.split(os.environ.get("CFLAGS", "")), *shlex.split(os.environ.get("LDFLAGS", ""))]
    if compiler is not None:
        with tempfile.TemporaryDirectory() as folder:
            command = [*compiler, "-x", "c", "-", *flags, "-laio", "-o", str(Path(folder, "program"))]
            if subprocess.run(command, input=LIBAIO, text=True, capture_output=True).returncode == 0:
                return
    raise MachineError(
        f"{asked} needs libaio with its headers, and they are not found",
        why="DeepSpeed's async_io extension, which reads and writes the disk, is compiled with them",
        fix="Install libaio-dev (libaio-devel on RPM systems), or name its folders in CFLAGS and LDFLAGS, or offload to cpu.",
    )


def _compiler(variable: str, *usual: str) -> list[str] | None:
    """The compiler's command, of an environment variable or by a usual name."""
    for words in (shlex.split(os.environ.get(variable, "")), *([name] for name in usual)):
        if words and shutil.which(words[0]):
            return words
    return None


def compiled_with_deepspeed(extension: str) -> Iterator[Path]:
    """Libraries of an extension that came compiled with DeepSpeed."""
    spec = importlib.util.find_spec("deepspeed")
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield from Path(place, "ops").glob(f"**/{extension}_op*.so")
