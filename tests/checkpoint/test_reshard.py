"""`toolkit checkpoint reshard`: there and back again gives the same bytes, in bounded memory, and
what is wrong is named.
"""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.checkpoint import synthetic
from tests.checkpoint.test_files import command
from tests.checkpoint.test_whole import TENSORS, weights
from tests.checkpoint.watched import watched
from toolkit.checkpoint.manifest import read_manifest, verify_files
from toolkit.errors import ToolkitError
from toolkit.files import FileRecord

MODEL = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 96, "vocab_size": 1000}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("synthetic") / "run/checkpoints", MODEL, dp=2)


def payload(folder: Path) -> list[FileRecord]:
    manifest = read_manifest(folder)
    assert verify_files(folder, manifest.files) == ""
    return [f for f in manifest.files if ".group-" in f.name]


THERE = (["parallel.tp=2", "parallel.pp=2", "parallel.vpp=2", "zero.stage=3"], 8)
OFFLOADED = (["zero.stage=2", "zero.offload_optimizer=cpu", "parallel.tp=2"], 4)


@pytest.mark.parametrize(("there", "processes"), [THERE, OFFLOADED], ids=["tp2 pp2 vpp2 dp2 zero3", "tp2 zero2 offload"])
def test_there_and_back(there: list[str], processes: int, saved: Path, tmp_path: Path) -> None:
    code, output = command("reshard", saved, tmp_path / "there", *there, "--num-procs", processes, "--workers", 2)
    assert code == 0 and f"{tmp_path}/there/checkpoints/step-00000003: step 3 for {processes} processes" in output.replace("\n", "")
    middle = tmp_path / "there/checkpoints/step-00000003"
    assert read_manifest(middle).processes == processes
    assert len({f.name[:10] for f in payload(middle)}) == processes
    back = ["parallel.tp=1", "parallel.pp=1", "parallel.vpp=1", "zero.stage=1", "zero.offload_optimizer=none"]
    code, output = command("reshard", tmp_path / "there", tmp_path / "step-00000003", *back, "--num-procs", 2, "--workers", 1)
    assert code == 0 and payload(tmp_path / "step-00000003") == payload(saved)
    assert {p.name for p in tmp_path.iterdir()} == {"there", "step-00000003"}


def fails(*arguments: object) -> str:
    """The message of a ToolkitError that the command ends with."""
    from typer.testing import CliRunner

    from toolkit.cli import app

    result = CliRunner().invoke(app, ["checkpoint", "reshard", *map(str, arguments)])
    assert isinstance(result.exception, ToolkitError), result.output
    return str(result.exception)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_source(workers: int, tmp_path: Path) -> None:
    saved = synthetic.write(tmp_path / "run/checkpoints", MODEL)
    path = saved / "rank-00000.group-000.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    out = tmp_path / "out"
    assert f"{path} is damaged: it does not match its checksum" in fails(
        saved, out, "parallel.tp=2", "--num-procs", 2, "--workers", workers
    )
    assert not out.exists()
    path.write_bytes(data[:-1])
    assert f"{path} is damaged" in fails(saved, out, "--workers", workers)
    path.unlink()
    assert str(path) in fails(saved, out) and not out.exists()


def test_what_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    saved = synthetic.write(tmp_path / "run/checkpoints", MODEL)
    for path in saved.glob("rank-*"):
        path.unlink()
    out = tmp_path / "out"
    assert "parallel.tp=3 does not divide model.num_attention_heads=4" in fails(saved, out, "parallel.tp=3", "--num-procs", 3)
    assert "parallel.pp=5" in fails(saved, out, "parallel.pp=5", "--num-procs", 5)
    assert "are no multiple" in fails(saved, out, "parallel.tp=2", "--num-procs", 3)
    assert "optimizer.lr=1 does not change how a checkpoint is cut" in fails(saved, out, "optimizer.lr=1")
    assert "parallel.tpp is not a known key" in fails(saved, out, "parallel.tpp=2")
    assert f"{saved} exists" in fails(saved, saved) and f"{tmp_path} exists" in fails(saved, tmp_path)
    assert "it is of step 3" in fails(saved, tmp_path / "step-00000009")
    assert "holds no checkpoint" in fails(tmp_path, out)
    only = weights(tmp_path / "weights", TENSORS)
    assert "holds weights without optimizer states" in fails(only, out, "parallel.tp=2", "--num-procs", 2)
    assert not out.exists()


def test_a_full_disk(saved: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = fails(saved, tmp_path / "out", "--workers", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "file too large" in message and str(tmp_path) in message and not (tmp_path / "out").exists()


def peak_bytes(source: Path, out: Path, *arguments: object) -> int:
    return watched("-m", "toolkit.cli", "checkpoint", "reshard", source, out, *arguments)[1]


SMALL = {**MODEL, "num_layers": 6, "hidden_size": 512, "ffn_hidden_size": 1536, "vocab_size": 8192}
LARGE = {**MODEL, "num_layers": 24, "hidden_size": 1024, "ffn_hidden_size": 2816, "vocab_size": 16384}
TO = ["parallel.tp=2", "parallel.pp=2", "zero.stage=3", "--num-procs", 4, "--workers", 2]


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Beyond what a worker takes for an empty model, most of it torch itself: two of the largest
    tensors and 50 MiB of buffers.
    """
    least = peak_bytes(synthetic.write(tmp_path / "tiny", MODEL), tmp_path / "none", *TO)
    states, largest = synthetic.state_bytes(SMALL)
    bound = 2 * largest + (50 << 20)
    assert states > 3 * bound
    assert peak_bytes(synthetic.write(tmp_path / "saved", SMALL, dp=2), tmp_path / "out", *TO) <= least + bound


@pytest.mark.all_cells
def test_memory_is_bounded(tmp_path: Path) -> None:
    states, largest = synthetic.state_bytes(LARGE)
    bound = 2 * largest + (1 << 30)
    assert states > 2.5 * bound
    assert peak_bytes(synthetic.write(tmp_path / "saved", LARGE, dp=2), tmp_path / "out", *TO) <= bound
