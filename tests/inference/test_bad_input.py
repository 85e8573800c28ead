"""What cannot be generated is refused with one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.convert import models  # noqa: E402
from toolkit.errors import CheckpointError, ConfigError, ConvertError, LayoutError, MachineError, ToolkitError  # noqa: E402
from toolkit.inference.generate import check_lengths  # noqa: E402
from toolkit.inference.plan import plan  # noqa: E402
from toolkit.inference.source import open_model  # noqa: E402

DEADLINE_S = 180


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 6 heads in 3 groups, with bytes for tokens."""
    shape = models.draw(1, even=True) | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "intermediate_size": 48}
    shape |= {"vocab_size": 257, "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return models.saved(models.llama(**shape, eos_token_id=None), tmp_path_factory.mktemp("bad") / "hf")


def refused(call: Any, kind: type[ToolkitError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_degrees_that_do_not_divide_name_the_nearest(folder: Path) -> None:
    section = open_model(folder).section

    def cut(*overrides: str, processes: int) -> Any:
        return plan(section, overrides, processes=processes, precision="fp32")

    assert cut("parallel.tp=3", processes=6)[1].dp == 2
    refused(
        lambda: cut("parallel.tp=2", processes=2),
        LayoutError,
        "parallel.tp=2 does not divide model.num_query_groups=3",
        "parallel.tp to 1 or 3",
    )
    refused(lambda: cut("parallel.tp=6", processes=6), LayoutError, "num_query_groups=3")
    refused(lambda: cut("parallel.pp=3", processes=4), LayoutError, "4 processes are no multiple of")
    refused(lambda: cut("parallel.vpp=2", processes=1), ConfigError, "parallel.vpp=2", "one chunk")
    refused(lambda: cut("model.hidden_size=8", processes=1), ConfigError, "model.hidden_size=8", "the checkpoint")


def test_prompts_that_fill_the_context() -> None:
    check_lengths([[1] * 7], context=8, names=["the prompt"])
    refused(lambda: check_lengths([[1], [1] * 8], context=8, names=["prompt 1", "prompt 2"]), ConfigError, "prompt 2 has 8 tokens", "7")


def test_what_is_no_model(folder: Path, tmp_path: Path) -> None:
    refused(lambda: open_model(tmp_path / "none"), CheckpointError, "does not exist")
    refused(lambda: open_model(tmp_path), CheckpointError, "holds no checkpoint")
    shards = sorted(folder.glob("*.safetensors"))
    copy = tmp_path / "hf"
    copy.mkdir()
    for path in folder.iterdir():
        if path != shards[-1]:
            (copy / path.name).symlink_to(path)
    refused(lambda: open_model(copy), ConvertError, shards[-1].name, "is missing")


def test_missing_shards_of_our_own(folder: Path, tmp_path: Path) -> None:
    from toolkit.convert.importing import import_model

    import_model(folder, tmp_path / "ours")
    assert open_model(tmp_path / "ours").section.num_query_groups == 3
    (tmp_path / "ours" / "weights-00000.safetensors").unlink()
    refused(lambda: open_model(tmp_path / "ours"), CheckpointError, "weights-00000.safetensors", "manifest")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "a", "--offload", "zero", "--auto"], "--offload zero beside --auto"),
        (["--offload", "zero-cpu", "--interactive"], "--offload zero-cpu beside --interactive"),
        (["--prompt", "a", "--offload", "zero-nvme"], "--offload zero-nvme without --nvme-path"),
        (["--prompt", "a", "--offload", "zero-nvme", "--nvme-path", "nowhere"], "--nvme-path nowhere is no folder"),
        (["--prompt", "a", "--nvme-path", "."], "--nvme-path without --offload zero-nvme"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt cannot be read: no such file"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "é" * 2048], "the prompt has 4,096 tokens, and the model's context is 4,096"),
        (["--prompt", "a", "--tokenizer", "nowhere.json"], "nowhere.json: no such file"),
        (["--prompt", "a", "--weights", "int4"], "--weights int4 with a weight of 48 columns"),
        (["--prompt", "a", "--kv", "cpu"], "--kv cpu on a machine without a GPU"),
    ],
)
def test_the_command_says_what_is_wrong(options: list[str], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from toolkit.cli import app

    def read(_: Any) -> None:
        raise AssertionError("weights are read, though what is wrong can be known without them")

    monkeypatch.setattr("toolkit.train.world.connect", lambda *_, **__: None)
    monkeypatch.setattr("toolkit.parallel.agree.everywhere", read)
    done = CliRunner().invoke(app, ["generate", str(folder), "--tokenizer", "bytes", *options])
    assert isinstance(done.exception, ToolkitError) and words in str(done.exception), done.exception


def test_what_nvme_needs_is_said_before_anything_starts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from toolkit.cli import app

    asked = ["generate", str(folder), "--tokenizer", "bytes", "--prompt", "a", "--offload", "zero-nvme", "--nvme-path"]
    done = CliRunner().invoke(app, [*asked, "/proc"])
    assert "--nvme-path /proc cannot be written to" in str(done.exception)
    lock = tmp_path / "extensions" / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    os.utime(lock.parent, (0, 0))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    done = CliRunner().invoke(app, [*asked, str(tmp_path)])
    # without libaio's headers nothing is compiled, and no lock is looked at
    words = (f"Delete {lock} and start again", "needs libaio", "needs a C++ compiler")
    assert isinstance(done.exception, MachineError) and any(w in str(done.exception) for w in words), done.exception
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    done = CliRunner().invoke(app, [*asked, str(tmp_path)])
    assert "--offload zero-nvme needs a C++ compiler" in str(done.exception)


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "toolkit", "generate", str(folder), "--tokenizer", "bytes", *arguments]


def test_command_on_one_process(folder: Path) -> None:
    done = subprocess.run(
        command(folder, "--prompt", "ab", "--max-new-tokens", "3", "--json"), capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["answers"][0]["prompt_tokens"] == 2 and len(found["answers"][0]["tokens"]) == 3
