"""What a user gets wrong gives one clear message, a non-zero exit code, no traceback and no hang, on every rank."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.train.conftest import Started
from toolkit.cluster.launch import local_command

CASES = {
    "unknown key": (["train.stepz=3"], 1, "train.steps"),
    "unknown section": (["trian.steps=3"], 1, "train"),
    "wrong type": (["train.steps=many"], 1, "train.steps"),
    "unknown preset": (["model.preset=lama3-8b"], 1, "llama3-8b"),
    "world size": (["parallel.tp=2"], 1, "parallel.tp=2"),
    "query groups": (["parallel.tp=4"], 4, "model.num_query_groups=2"),
    "batch": (["train.micro_batch_size=3"], 1, "train.global_batch_size=4"),
    "sequence": (["train.seq_length=128"], 1, "model.max_position_embeddings=64"),
    "missing source": (["data.source=no/such/text"], 1, "no/such/text"),
    "missing DeepSpeed JSON": (["zero.config=none.json"], 1, "none.json"),
    "small vocabulary": (["model.vocab_size=100"], 1, "model.vocab_size=100"),
    "offload stage": (["zero.offload_param=cpu"], 1, "zero.stage=3"),
    "nvme without a place": (["zero.stage=3", "zero.offload_optimizer=nvme"], 1, "zero.nvme_path"),
    "gpu layout": (["model.impl=te"], 1, "model.impl=te"),
    "context parallel": (["parallel.cp=2"], 2, "parallel.cp=2"),
}


@pytest.mark.parametrize(("overrides", "procs", "named"), [pytest.param(*c, id=k.replace(" ", "-")) for k, c in CASES.items()])
def test_one_message_through_the_launcher(shared: Started, overrides: list[str], procs: int, named: str) -> None:
    done = shared.train(*overrides, procs=procs, timeout_s=120)
    assert done.code == 2, done.output
    assert "Traceback" not in done.output
    assert named in done.output and done.output.count("error:") == 1, done.output


def _ranks_without_the_command(shared: Started, *overrides: str, procs: int = 2) -> list[str]:
    return local_command(shared.config, overrides, num_procs=procs, python=sys.executable)


def test_ranks_started_by_the_bare_launcher_refuse_alike(shared: Started) -> None:
    done = shared.run(_ranks_without_the_command(shared, "parallel.tp=4"), timeout_s=120)
    assert done.code != 0 and done.output.count("does not divide") == 1, done.output
    assert "error: " in done.output and "toolkit/train" not in done.output.replace("toolkit.train", "")


def test_a_missing_config_file(shared: Started) -> None:
    done = shared.run([sys.executable, "-m", "toolkit.cli", "train", str(shared.folder / "absent.yaml")])
    assert done.code == 2 and "absent.yaml" in done.output and "Traceback" not in done.output


def _prepared(shared: Started, text: Path, name: str, tokenizer: str = "bytes") -> Path:
    prefix = shared.folder / "prepared" / name
    done = shared.run([sys.executable, "-m", "toolkit.cli", "data", "prepare", str(text), "--out", str(prefix), "--tokenizer", tokenizer])
    assert done.code == 0, done.output
    return prefix


def test_a_corrupt_index(shared: Started, text: Path) -> None:
    prefix = _prepared(shared, text, "cut")
    index = prefix.with_suffix(".idx")
    os.truncate(index, index.stat().st_size - 7)
    done = shared.train(f"data.source={prefix}", procs=2)
    assert done.code == 2 and "Traceback" not in done.output and "cut.idx" in done.output


def test_a_tokenizer_that_is_not_the_data_s(shared: Started, text: Path) -> None:
    prefix = _prepared(shared, text, "words", "train:300")
    done = shared.train(f"data.source={prefix}", "data.tokenizer=bytes")
    assert done.code == 2 and "Traceback" not in done.output and "tokenizer" in done.output
    assert shared.train(
        f"data.source={prefix}", f"data.tokenizer={prefix}.tokenizer.json", f"run.dir={shared.folder / 'runs' / 'words'}"
    ).code in (0, 2)


def test_a_stale_build_lock(shared: Started, tmp_path: Path) -> None:
    folder = tmp_path / "ext" / "cpu_adam"
    folder.mkdir(parents=True)
    lock = folder / "lock"
    lock.touch()
    os.utime(lock, (1, 1))
    os.utime(folder, (1, 1))
    command = [
        "env",
        f"TORCH_EXTENSIONS_DIR={tmp_path / 'ext'}",
        *shared.command(f"run.dir={tmp_path / 'run'}", "zero.offload_optimizer=cpu"),
    ]
    done = shared.run(command, timeout_s=120)
    assert done.code == 2 and str(lock) in done.output and "Traceback" not in done.output
    shutil.rmtree(folder)
