"""The scripts in launch/: what they say when called wrongly, and that errors come through.
test_two_hosts_train.py trains.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = str(Path(sys.executable).parent)


def call(script: str, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}", **environ}
    return subprocess.run([str(REPOSITORY / "launch" / script), *args], env=env, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["local.sh", "multi-node.sh"])
def test_a_script_without_a_config_says_how_to_use_it(script: str) -> None:
    done = call(script)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1


def test_a_missing_hostfile_is_one_message(tmp_path: Path) -> None:
    done = call("multi-node.sh", "c.yaml", HOSTFILE=str(tmp_path / "none"), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith(f"there is no hostfile {tmp_path}/none") and done.stderr.count("\n") == 1


@pytest.mark.skipif(shutil.which("toolkit", path=TOOLS) is None, reason="the toolkit is not installed beside this interpreter")
def test_the_local_script_passes_on_a_refused_config(tmp_path: Path) -> None:
    done = call("local.sh", str(tmp_path / "none.yaml"), NUM_PROCS="2", CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 2 and "none.yaml" in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr
