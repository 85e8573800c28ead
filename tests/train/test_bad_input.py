"""What a user gets wrong gives one clear message, a non-zero exit code, no traceback and no hang,
on every rank.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.site.warm import run_python, run_toolkit
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
    "context parallel": (["parallel.cp=3"], 3, "parallel.cp=3"),
}


@pytest.mark.parametrize(("overrides", "procs", "named"), [pytest.param(*c, id=k.replace(" ", "-")) for k, c in CASES.items()])
def test_one_message(shared: Started, overrides: list[str], procs: int, named: str) -> None:
    done = run_toolkit(["train", str(shared.config), *overrides, "--num-procs", str(procs)], shared.folder)
    assert done.code == 2, done.output
    assert "Traceback" not in done.output
    assert named in done.output and done.output.count("error:") == 1, done.output


def test_a_process_of_its_own_says_the_same(shared: Started) -> None:
    overrides, procs, _ = CASES["query groups"]
    forked = run_toolkit(["train", str(shared.config), *overrides, "--num-procs", str(procs)], shared.folder)
    assert shared.train(*overrides, procs=procs) == forked


def _ranks_without_the_command(shared: Started, *overrides: str, procs: int = 2) -> list[str]:
    return local_command(shared.config, overrides, num_procs=procs, python=sys.executable)


def test_ranks_started_by_the_bare_launcher_refuse_alike(shared: Started) -> None:
    done = shared.run(_ranks_without_the_command(shared, "parallel.tp=4"))
    assert done.code != 0 and done.output.count("does not divide") == 1, done.output
    assert "error: " in done.output and "toolkit/train" not in done.output.replace("toolkit.train", "")


def test_a_missing_config_file(shared: Started) -> None:
    done = run_toolkit(["train", str(shared.folder / "absent.yaml")], shared.folder)
    assert done.code == 2 and "absent.yaml" in done.output and "Traceback" not in done.output


def _prepared(shared: Started, text: Path, name: str, tokenizer: str = "bytes") -> Path:
    prefix = shared.folder / "prepared" / name
    done = run_toolkit(["data", "prepare", str(text), "--out", str(prefix), "--tokenizer", tokenizer], shared.folder)
    assert done.code == 0, done.output
    return prefix


def test_a_corrupt_index(shared: Started, text: Path) -> None:
    prefix = _prepared(shared, text, "cut")
    index = prefix.with_suffix(".idx")
    os.truncate(index, index.stat().st_size - 7)
    done = run_toolkit(["train", str(shared.config), f"data.source={prefix}", "--num-procs", "2"], shared.folder)
    assert done.code == 2 and "Traceback" not in done.output and "cut.idx" in done.output


def test_a_tokenizer_that_is_not_the_data_s(shared: Started, text: Path) -> None:
    prefix = _prepared(shared, text, "words", "train:300")
    words = ["train", str(shared.config), f"data.source={prefix}", "--dry-run"]
    done = run_toolkit([*words, "data.tokenizer=bytes"], shared.folder)
    assert done.code == 2 and "Traceback" not in done.output and "tokenizer" in done.output
    done = run_toolkit([*words, f"data.tokenizer={prefix}.tokenizer.json"], shared.folder)
    assert done.code == 0, done.output


def test_a_stale_build_lock(shared: Started, tmp_path: Path) -> None:
    folder = tmp_path / "ext" / "cpu_adam"
    folder.mkdir(parents=True)
    lock = folder / "lock"
    lock.touch()
    os.utime(lock, (1, 1))
    os.utime(folder, (1, 1))
    arguments = [str(shared.config), f"run.dir={tmp_path / 'run'}", "zero.offload_optimizer=cpu"]
    rank = (
        f"import os, sys\nos.environ['TORCH_EXTENSIONS_DIR'] = {str(tmp_path / 'ext')!r}\n"
        f"from toolkit.train.__main__ import main\nsys.exit(main({arguments}))"
    )
    done = run_python(rank, shared.folder)
    assert done.code == 2 and str(lock) in done.output and "Traceback" not in done.output
