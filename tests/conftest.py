"""Shared by all tests: the worker pool, the extensions DeepSpeed compiles, and the order of tests."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import examples
from tests.builds import end_build, start_build
from tests.pool import Pool
from tests.shares import scheduler, turn

# the same examples everywhere, and none that fails because a machine was busy
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

os.environ.setdefault("OMP_NUM_THREADS", "1")
# the tests' own builds: another environment's would be compiled anew each time, and its locks are
# not ours to judge
os.environ["TORCH_EXTENSIONS_DIR"] = str(
    Path(__file__).parents[1] / "build" / f"extensions-py{sys.version_info.major}{sys.version_info.minor}"
)

# compiled anew in each session: one that was killed while it linked would leave a library that no
# later session can load
INDUCTOR = tempfile.TemporaryDirectory(prefix="inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = INDUCTOR.name

# one ninja for the tests and what they start: another version knows nothing of a build and compiles it anew
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

EXTENSIONS = ("cpu_adam", "async_io")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four worker processes, started at the first distributed test and kept for all of them."""
    workers = Pool(4)
    yield workers
    workers.close()


class Extensions:
    """DeepSpeed's compiled parts, built beside the tests that do not need them."""

    def __init__(self, folder: Path, names: set[str]) -> None:
        self.logs = {name: folder / f"{name}.log" for name in EXTENSIONS}
        self.builds = {name: self._start(name) for name in sorted(names)}

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        code = f"from tests.builds import compile_extension\ncompile_extension({name!r})"
        return start_build(code, log=self.logs[name], env={**os.environ, "DS_ACCELERATOR": "cpu", "MAX_JOBS": "2"})

    def wait(self, name: str) -> None:
        """Return once an extension is there; skip the test where the machine cannot build it."""
        if name not in self.builds:
            self.builds[name] = self._start(name)
        if self.builds[name].wait(timeout=900) != 0:
            text = self.logs[name].read_text()
            if name == "async_io" and "libaio" in text:
                pytest.skip("NVMe offload needs libaio's headers: install libaio-dev")
            if shutil.which("c++") is None:
                pytest.skip(f"DeepSpeed's {name} needs a C++ compiler")
            pytest.fail(f"DeepSpeed could not build {name}:\n{text[-3000:]}")

    def close(self) -> None:
        """End what is still compiling."""
        for build in self.builds.values():
            end_build(build)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cells", action="store_true", help="also the long ones (make parity)")


def pytest_configure(config: pytest.Config) -> None:
    examples.ALL = config.option.all_cells


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first, so that processes that share the tests end together; with --all-cells what
    waits for a compiler last.
    """
    if not config.option.all_cells:
        left_out = [i for i in items if i.get_closest_marker("all_cells")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [i for i in items if not i.get_closest_marker("all_cells")]
        items.sort(key=lambda i: (turn(i.nodeid), "parity/" in i.nodeid and "cpu" in i.name))
    else:
        items.sort(key=lambda i: ("parity/" in i.nodeid, "nvme" in i.name, "parity/" in i.nodeid and "cpu" in i.name))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return scheduler(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start compiling as soon as it is clear that offload will be tested; what no test's name tells
    is started when it is asked for.
    """
    waiting = [i.name for i in session.items if "extension" in getattr(i, "fixturenames", ())]
    names = {"cpu_adam"} if any("cpu" in name or "offload" in name for name in waiting) else set()
    names |= {"cpu_adam", "async_io"} if any("nvme" in name for name in waiting) else set()
    if waiting and not session.config.option.collectonly:
        folder = Path(session.config._tmp_path_factory.mktemp("extensions"))  # type: ignore[attr-defined]
        session.config.extensions = Extensions(folder, names)  # type: ignore[attr-defined]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if extensions := getattr(session.config, "extensions", None):
        extensions.close()


@pytest.fixture(scope="session")
def extension(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call it with "cpu_adam" or "async_io" before a run that needs one."""
    return request.config.extensions.wait  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of texts with structure enough to learn from."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(50)]
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(" ".join(draw.choices(words, k=200)))
    return folder


@pytest.fixture(scope="session")
def text(documents: Path) -> Path:
    """What a run trains on; tests/checkpoint has a smaller one of its own."""
    return documents
