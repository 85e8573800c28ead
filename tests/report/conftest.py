"""The profiled run of tests/profile, and a ranking in the form that `toolkit tune` writes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.profile.conftest import profiled

__all__ = ["profiled"]


def ranking() -> dict[str, Any]:
    """tune.json with three plans; names of hardware hold what HTML must escape."""
    plans = [
        {
            "layout": {
                "tp": tp,
                "pp": pp,
                "vpp": 1,
                "cp": 1,
                "dp": 16 // (tp * pp),
                "zero": zero,
                "micro": 1,
                "recompute": "none",
                "sp": tp > 1,
            },
            "tokens_per_s": rate,
            "step_s": 1e6 / rate,
            "peak_device_gib": need,
            "capacity_gib": 79.1,
            "why_not": "" if need > 70 else "<b>slower</b>",
        }
        for tp, pp, zero, rate, need in ((1, 1, 1, 144e3, 77.0), (2, 1, 2, 140e3, 51.0), (2, 2, 1, 130e3, 40.0))
    ]
    return {"format": 1, "hardware": "h100 & <80gb>", "limits": ["matmul 68 % of the step"], "plans": plans}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    folder = tmp_path / "plan"
    folder.mkdir()
    (folder / "tune.json").write_text(json.dumps(ranking()))
    return folder


class Browser:
    """A headless Chromium that keeps to itself."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program, self.folder = program, folder
        self.runs = 0

    def run(self, page: Path, *options: str, query: str = "") -> str:
        """Open a page, with `?…` behind its address, and return what the browser prints."""
        self.runs += 1
        quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars")
        profile = self.folder / f"profile-{self.runs}"
        command = [
            self.program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            *quiet,
            f"--user-data-dir={profile}",
            *options,
            page.as_uri() + query,
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("looking at the report needs Chromium: install the package chromium")
    return Browser(program, tmp_path_factory.mktemp("browser"))
