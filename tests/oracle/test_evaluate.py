"""`toolkit evaluate`: transformers' loss on the same tokens, each once, under any layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import loop
from tests.oracle.reference import load
from tests.pool import Pool
from toolkit.data.prepare import prepare
from toolkit.evaluate.resolve import Evaluation, resolve_evaluation

SEQ = 32
WORLDS = {
    "one process": (1, ["zero.stage=0"]),
    "dp2-zero2": (2, ["zero.stage=2"]),
    "tp2-pp2-zero3": (4, ["zero.stage=3", "parallel.tp=2", "parallel.pp=2"]),
    "cp2-zero1": (2, ["zero.stage=1", "parallel.cp=2"]),
}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand bytes, prepared: neither windows nor batches come out even."""
    folder = tmp_path_factory.mktemp("few")
    for i, words in enumerate(("the first document ", "another one, longer ", "end ")):
        (folder / f"{i}.txt").write_text("".join(f"{words}{n} " for n in range(18)))
    prepare(str(folder), tokenizer="bytes", out=folder / "few", workers=1, progress=False)
    return folder / "few"


@pytest.fixture(scope="module")
def evaluated(pool: Pool, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """evaluated(checkpoint, world, …): what the ranks of a world find, which must be alike on all."""
    numbers = itertools.count()
    root = tmp_path_factory.mktemp("evaluations")

    def run(checkpoint: Path, world: str, *keys: str, batches: int | None = None, split: str = "all") -> dict[str, Any]:
        ranks, layout = WORLDS[world]
        overrides = [f"train.seq_length={SEQ}", "train.global_batch_size=8", "train.micro_batch_size=2", "data.workers=0", *layout, *keys]
        asked: Evaluation = resolve_evaluation(checkpoint, str(few), overrides, num_procs=ranks, batches=batches, split=split)
        folder = root / str(next(numbers))
        folder.mkdir()
        asked.write(folder)
        found = pool.run("toolkit.evaluate.__main__:measure", ranks, folder, deadline_s=180)
        assert len({f["loss"] for f in found}) == 1 and len({f["tokens"] for f in found}) == 1
        return {**found[0], "whole": asked.whole}

    return run


@torch.no_grad()
def expected(hf: Path, ids: np.ndarray, *, apart: bool = False) -> float:
    """transformers' mean loss over all ids but the first, in windows of SEQ that do not overlap;
    apart: each document of one alone.
    """
    model, total, labels = load(hf).eval(), 0.0, 0
    for start in range(0, len(ids) - 1, SEQ):
        window = torch.from_numpy(ids[start : start + SEQ + 1].astype(np.int64))
        ends = (window == 256).nonzero().flatten() + 1
        for piece in window.tensor_split(ends) if apart else (window,):
            if len(piece) > 1:
                total += float(model(input_ids=piece[None], labels=piece[None]).loss) * (len(piece) - 1)
                labels += len(piece) - 1
    return total / labels


@pytest.mark.parametrize(("model", "world"), [("llama", "one process"), ("llama", "tp2-pp2-zero3"), ("gpt2", "dp2-zero2")])
def test_it_is_transformers_loss_on_every_token(
    model: str, world: str, folders: Any, few: Path, evaluated: Callable[..., dict[str, Any]]
) -> None:
    ids = np.fromfile(f"{few}.bin", dtype=np.uint16)
    assert (len(ids) - 1) % SEQ and -(-(len(ids) - 1) // SEQ) % 8, "the tail must be a part of a window, and of a batch"
    theirs, ours = folders(model)
    found = evaluated(ours, world, "model.dropout=0.3")
    assert found["tokens"] == len(ids) - 1 and found["whole"]
    assert found["loss"] == pytest.approx(expected(theirs, ids), rel=1e-5)


def test_documents_apart_on_a_shared_sequence(folders: Any, few: Path, evaluated: Callable[..., dict[str, Any]]) -> None:
    ids = np.fromfile(f"{few}.bin", dtype=np.uint16)
    theirs, ours = folders("llama")
    found = evaluated(ours, "cp2-zero1", "data.document_mask=true")
    assert found["tokens"] == len(ids) - np.count_nonzero(ids == 256)
    assert found["loss"] == pytest.approx(expected(theirs, ids, apart=True), rel=1e-5)
    assert found["loss"] != pytest.approx(expected(theirs, ids), rel=1e-5)


def test_a_part_is_the_part_that_was_asked_for(folders: Any, few: Path, evaluated: Callable[..., dict[str, Any]]) -> None:
    ids = np.fromfile(f"{few}.bin", dtype=np.uint16)
    theirs, ours = folders("llama")
    first = evaluated(ours, "dp2-zero2", batches=2)
    assert first["tokens"] == 2 * 8 * SEQ and not first["whole"]
    assert first["loss"] == pytest.approx(expected(theirs, ids[: 2 * 8 * SEQ + 1]), rel=1e-5)
    valid = evaluated(ours, "dp2-zero2", "data.split=[34, 33, 33]", split="valid")
    ends = np.flatnonzero(ids == 256) + 1
    assert valid["loss"] == pytest.approx(expected(theirs, ids[ends[0] : ends[1]]), rel=1e-5)


def test_an_own_checkpoint_gives_one_loss_in_every_layout(
    pool: Pool, text: Path, tmp_path: Path, evaluated: Callable[..., dict[str, Any]]
) -> None:
    """Trained with dropout, which must be off: its masks differ between layouts."""
    keys = {"train.steps": 3, "checkpoint.every": 3, "model.dropout": 0.2, "parallel.tp": 2, "zero.stage": 2}
    pool.run("tests.loop:train", 2, loop.config_of(text, tmp_path / "run", keys), deadline_s=180)
    losses = [evaluated(tmp_path / "run", world, "parallel.tp=1", "parallel.pp=1")["loss"] for world in ("one process", "dp2-zero2")]
    losses.append(evaluated(tmp_path / "run", "tp2-pp2-zero3")["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert 3.0 < losses[0] < 5.6, "between what it learnt in three steps and knowing nothing"
