"""What lies in a checkpoint's files, and the commands over a folder of them."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.checkpoint.run import config_of
from tests.pool import Pool
from toolkit.checkpoint.manifest import Manifest, discover, read_manifest, verify_files, write_manifest
from toolkit.errors import CheckpointError
from toolkit.files import FileRecord
from toolkit.tensors import read_tensors, write_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=5), st.text(max_size=20))
def test_tensors_come_back(tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[torch.dtype, list[int]]], note: str) -> None:
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    tensors = {f"t{i}": torch.randn(shape).mul(50).to(dtype) for i, (dtype, shape) in enumerate(shapes)}
    record = write_tensors(path, tensors, metadata={"note": note})
    found, metadata = read_tensors(path)
    assert metadata == {"note": note} and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert record == FileRecord(name=path.name, bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_large_file_is_written_whole(tmp_path: Path) -> None:
    tensor = torch.arange(3_000_000, dtype=torch.int64)  # several chunks
    record = write_tensors(tmp_path / "a.safetensors", {"x": tensor}, metadata={})
    assert verify_files(tmp_path, [record]) == ""
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")[0]["x"], tensor)


def checkpoint(folder: Path, step: int) -> Path:
    """A complete checkpoint with one file."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    record = write_tensors(path / "rank-00000.group-000.safetensors", {"master": torch.ones(1000) * step}, metadata={})
    degrees = dict.fromkeys(("parallel.tp", "parallel.pp", "parallel.vpp"), 1)
    write_manifest(
        path,
        Manifest(
            step=step,
            consumed_samples=8 * step,
            processes=2,
            layout={**degrees, "dp": 2, "zero.stage": 1, "train.precision": "bf16"},
            identity={},
            probe={},
            config={},
            versions={},
            saved_at="2025-01-01T00:00:00Z",
            files=[record],
        ),
    )
    return path


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_changed_byte_of_a_manifest_is_believed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = checkpoint(tmp_path_factory.mktemp("manifest"), 7) / "manifest.json"
    text, meant = bytearray(path.read_bytes()), read_manifest(path.parent)
    i = data.draw(st.integers(0, len(text) - 1))
    text[i] ^= data.draw(st.integers(1, 255))
    path.write_bytes(text)
    try:
        assert read_manifest(path.parent) == meant  # white space may differ
    except ValueError as e:
        assert str(path) in str(e)


def command(*arguments: object) -> tuple[int, str]:
    """Exit code (2 for a CheckpointError, as main() gives it) and output."""
    from toolkit.cli import app

    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)], env={"COLUMNS": "200"})
    if isinstance(result.exception, CheckpointError):
        return result.exception.exit_code, result.output + str(result.exception)
    return result.exit_code, result.output


def test_commands(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    paths = {step: checkpoint(folder, step) for step in (1, 2, 3, 4, 5)}
    (folder / ".partial-step-00000006-abcd").mkdir()
    (folder / "latest").write_text("step-00000001")  # advice, and wrong
    code, output = command("list", tmp_path)
    assert code == 0 and [line.split()[0] for line in output.splitlines()[1:]] == list("54321") and "dp 2 ZeRO-1 bf16" in output
    code, output = command("verify", folder)
    assert code == 0 and output.count("good") == 5

    data = bytearray((paths[5] / "rank-00000.group-000.safetensors").read_bytes())
    data[-1] ^= 4
    (paths[5] / "rank-00000.group-000.safetensors").write_bytes(data)
    (paths[4] / "manifest.json").unlink()
    code, output = command("verify", tmp_path)
    assert code == 2 and "step-00000005: DAMAGED" in output and "rank-00000.group-000.safetensors" in output
    assert "step-00000004: unfinished" in output and "1 of 5 checkpoints" in output

    code, output = command("prune", tmp_path, "--keep", 1)
    assert code == 0 and "step-00000005 stays, damaged" in output
    assert [f.step for f in discover(folder)] == [5, 3], "the newest good one stays, as does the damaged one"
    assert not [p for p in folder.iterdir() if p.name.startswith((".partial", ".deleted"))]
    assert "nothing to delete" in command("prune", tmp_path, "--keep", 1)[1]
    assert command("list", tmp_path / "nowhere")[0] == 2
    code, output = command("verify", paths[3])
    assert code == 0 and "step-00000003: good" in output
    code, output = command("list", paths[3])
    assert code == 0 and [line.split()[0] for line in output.splitlines()[1:]] == ["3"]
    assert command("prune", paths[3])[0] == 2 and paths[3].exists(), "a single checkpoint is no folder of them"


# -- fragments: what any other layout will be read from ----------------------------------------------

SOURCES = {
    "one": (1, {"zero.stage": 1}),
    "zero0": (2, {"zero.stage": 0}),
    "zero1": (2, {"zero.stage": 1}),
    "zero2": (2, {"zero.stage": 2}),
    "zero3": (2, {"zero.stage": 3}),
    "pp": (4, {"zero.stage": 2, "parallel.pp": 2, "parallel.vpp": 2}),
}


def assembled(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter's fp32 value from the files alone; each element must be there exactly once."""
    values: dict[str, torch.Tensor] = {}
    times: dict[str, torch.Tensor] = defaultdict(torch.Tensor)
    for path in sorted(folder.glob("*.group-*.safetensors")):
        tensors, metadata = read_tensors(path)
        parameters: dict[str, Any] = json.loads(metadata["parameters"])
        for name, start, at, count in json.loads(metadata["fragments"]):
            size = torch.Size(parameters[name]["shape"]).numel()
            values.setdefault(name, torch.zeros(size))[start : start + count] = tensors["master"][at : at + count]
            if name not in times:
                times[name] = torch.zeros(size)
            times[name][start : start + count] += 1
    assert all(bool((t == 1).all()) for t in times.values())
    return values


@pytest.fixture(scope="module")
def expected(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return saved(pool, tmp_path_factory.mktemp("one"), "one")


def saved(pool: Pool, folder: Path, source: str) -> dict[str, torch.Tensor]:
    world, keys = SOURCES[source]
    pool.run("tests.checkpoint.run:train", world, config_of(folder, keys, steps=2, checkpoint={"every": 2}), deadline_s=300)
    return assembled(folder / "checkpoints/step-00000002")


@pytest.mark.parametrize("source", [s for s in SOURCES if s != "one"])
def test_fragments_make_up_the_whole_model(source: str, pool: Pool, tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = saved(pool, tmp_path, source)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
