"""Damaged, missing, foreign and contested checkpoints: each is named, nothing is deleted, and the
run goes on where it may.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.runs import Run, metrics, running, write_config
from toolkit.checkpoint.manifest import discover

STEPS = 4
FILE = "rank-00000.group-000.safetensors"


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps with checkpoints of steps 2, 3 and 4; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    run = Run(write_config(folder, text, steps=STEPS, every=1, keep=3))
    assert run.wait() == 0, run.text()
    assert [f.step for f in discover(folder / "run/checkpoints")] == [4, 3, 2]
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """Its run folder, to be damaged."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def again(finished: Path, run: Path, *overrides: str, ranks: int = 1) -> tuple[int, str]:
    """Start the same config once more on another run folder: exit code and output."""
    config = shutil.copy(finished / "config.yaml", run.parent / "config.yaml")
    started = Run(Path(config), f"run.dir={run}", *overrides, ranks=ranks)
    return started.wait(), started.text()


def truncate(newest: Path) -> str:
    with (newest / FILE).open("r+b") as f:
        f.truncate(1000)
    return f"{newest / FILE} has 1000 bytes"


def flip_a_bit(newest: Path) -> str:
    data = bytearray((newest / FILE).read_bytes())
    data[-100] ^= 1
    (newest / FILE).write_bytes(data)
    return f"{newest / FILE} is damaged"


def remove(newest: Path) -> str:
    (newest / FILE).unlink()
    return f"{newest / FILE} is missing"


def swap(newest: Path) -> str:
    shutil.copy(newest.with_name("step-00000003") / FILE, newest / FILE)
    return f"{newest / FILE} is damaged"


def empty_manifest(newest: Path) -> str:
    (newest / "manifest.json").write_text("")
    return f"{newest / 'manifest.json'} is damaged"


def change_manifest(newest: Path) -> str:
    path = newest / "manifest.json"
    path.write_text(path.read_text().replace('"consumed_samples": 16', '"consumed_samples": 12'))
    return f"{path} is damaged"


def age_manifest(newest: Path) -> str:
    path = newest / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    return f"{path} has format 0, and this version reads format 1"


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove, swap, empty_manifest, change_manifest, age_manifest])
def test_a_damaged_checkpoint(damage: Callable[[Path], str], finished: Path, copy: Path) -> None:
    expected = damage(copy / "checkpoints/step-00000004")
    before = sorted(copy.rglob("*"))

    code, output = again(finished, copy, "checkpoint.resume=must")
    assert code == 2 and expected in output and "Traceback" not in output
    assert sorted(copy.rglob("*")) == before and metrics(copy) == metrics(finished / "run")

    code, output = again(finished, copy)
    assert code == 0 and expected in output and f"resuming from {copy}/checkpoints/step-00000003" in output
    assert metrics(copy) == metrics(finished / "run")
    assert [f.step for f in discover(copy / "checkpoints") if f.manifest] == [4, 3, 2]
    # the damaged one is still there to be looked at
    assert len(list((copy / "checkpoints").glob("replaced-step-00000004-*"))) == 1


def test_none_is_good(finished: Path, copy: Path) -> None:
    for path in (copy / "checkpoints").glob("step-*"):
        flip_a_bit(path)
    before = sorted(copy.rglob("*"))
    code, output = again(finished, copy)
    assert code == 2 and "none of the 3 checkpoints" in output and "Traceback" not in output
    assert sorted(copy.rglob("*")) == before


def test_must_never_starts_over(finished: Path, tmp_path: Path) -> None:
    code, output = again(finished, tmp_path / "new", "checkpoint.resume=must")
    assert code == 2 and "holds no complete checkpoint" in output


def test_never_leaves_an_existing_run_alone(finished: Path, copy: Path) -> None:
    before = _sizes(copy)
    code, output = again(finished, copy, "checkpoint.resume=never", "train.steps=3")
    assert code == 2 and "checkpoint.resume=never" in output and "3 checkpoints" in output
    assert _sizes(copy) == before


def _sizes(folder: Path) -> list[tuple[Path, int]]:
    return sorted((p, p.stat().st_size) for p in folder.rglob("*") if p.name != ".lock")  # which names the process that looked last


def test_an_unfinished_folder_is_passed_over_and_replaced(finished: Path, copy: Path) -> None:
    (copy / "checkpoints/step-00000004/manifest.json").unlink()
    code, output = again(finished, copy)
    assert code == 0 and "step-00000004 was not finished" in output
    assert metrics(copy) == metrics(finished / "run")
    assert [f.step for f in discover(copy / "checkpoints") if f.manifest] == [4, 3, 2]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.hidden_size=32", "model.hidden_size=16"),
        ("run.seed=7", "run.seed=1234"),
        ("train.global_batch_size=8", "train.global_batch_size=4"),
        ("data.tokenizer=train:300", "data.tokenizer=sha256"),
        ("data.source=TEXT", "data.source=sha256"),
    ],
)
def test_another_run(override: str, named: str, finished: Path, copy: Path) -> None:
    other = copy.parent / "other.txt"
    other.write_text("A text of another kind, and long enough for a sample or two. " * 40)
    override = override.replace("TEXT", str(other))
    before = sorted(copy.rglob("*"))
    code, output = again(finished, copy, override)
    assert code == 2 and named in output and override.split("=")[0] in output and "Traceback" not in output
    assert sorted(copy.rglob("*")) == before


def test_a_longer_run_that_shuffles_differently(finished: Path, copy: Path) -> None:
    """More steps than one pass over the data has: megatron-core shuffles all passes together."""
    code, output = again(finished, copy, "train.steps=2000")
    assert code == 2 and "the order of the samples is not that of" in output and "train.steps=4" in output


def test_a_longer_run_within_one_pass_goes_on(finished: Path, copy: Path) -> None:
    code, output = again(finished, copy, "train.steps=6", "optimizer.schedule=constant")
    assert code == 0 and "train.steps: 4 -> 6" in output
    assert [m[0] for m in metrics(copy)] == [1, 2, 3, 4, 5, 6]


def test_two_runs_in_one_folder(text: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, text, steps=100_000, every=10)
    log = tmp_path / "run/metrics.jsonl"
    with running(lambda: Run(config)) as first:
        while not (log.exists() and log.read_text().count("\n") >= 3):
            assert first.processes[0].is_alive(), first.text()
            time.sleep(0.01)
        second = Run(config)
        assert second.wait() == 2
        assert f"is in use by process {first.processes[0].pid}" in second.text()
        assert first.processes[0].is_alive()
        first.processes[0].terminate()
        assert first.wait() == 143, first.text()  # as a SIGTERM before the last step ends a run
    steps = [m[0] for m in metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_on_one_rank_ends_all(asynchronous: bool, text: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: writing fails half-way with an error."""
    config = write_config(tmp_path, text, steps=6, every=2, async_save=asynchronous)
    assert (first := Run(config, "train.steps=2", "optimizer.schedule=constant", ranks=2)).wait() == 0, first.text()
    run = Run(config, "optimizer.schedule=constant", ranks=2, limits={resource.RLIMIT_FSIZE: 40_000})
    assert run.wait() == 2, run.text()
    first_rank, second_rank = (output.read_text() for output in run.output)
    # rank 1 met the limit; rank 0, which speaks for its host, names rank 1's file
    assert re.search(r"error: saving to \S+/rank-00001\.\S+ failed on host \S+: file too large", first_rank), run.text()
    assert "error" not in second_rank and "Traceback" not in run.text()
    assert [f.step for f in discover(tmp_path / "run/checkpoints") if f.manifest] == [2]
    assert (last := Run(config, "optimizer.schedule=constant", ranks=2)).wait() == 0, last.text()
    assert [m[0] for m in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_folder_that_cannot_be_written() -> None:
    """As a user without rights, since root may write anywhere."""
    import tempfile

    from toolkit.checkpoint.claim import claim
    from toolkit.config.load import parse_config
    from toolkit.errors import CheckpointError

    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        folder = Path(name) / "closed"
        folder.mkdir(mode=0o555)
        shape = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
        config = parse_config({"run": {"dir": str(folder / "run")}, "model": shape})
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(CheckpointError, match=r"run\.dir=.*/closed/run cannot be written: permission denied\. Set run\.dir"):
                claim(config, will_save=True)
        finally:
            if root:
                os.seteuid(0)
