"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to train on."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("\n\n".join(f"{i} times {i} is {i * i}." for i in range(400)))
    return path


@pytest.fixture
def compiled(extension: Callable[[str], None]) -> Callable[[dict[str, Any]], None]:
    """Call it with a config's keys: returns once what DeepSpeed compiles for them is there, or skips."""

    def wait(keys: dict[str, Any]) -> None:
        devices = {v for k, v in keys.items() if "offload" in k} - {"none"}
        for name in (["cpu_adam"] if devices else []) + (["async_io"] if "nvme" in devices else []):
            extension(name)

    return wait
