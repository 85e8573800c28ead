"""What `toolkit evaluate` decides and refuses before it starts anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit.checkpoint.manifest import read_manifest
from toolkit.data.prepare import prepare
from toolkit.data.tokenizer import BytesTokenizer
from toolkit.errors import DataError, LayoutError, ToolkitError
from toolkit.evaluate.resolve import Evaluation, read, resolve_evaluation
from toolkit.evaluate.windows import Span, Windows

STORED = Path(__file__).parents[1] / "checkpoint" / "stored" / "step-00000002"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The folder of a checkpoint of TP 2 that was trained on bytes, without the weights that
    nothing here reads.
    """
    stored = read_manifest(STORED)
    config = {**stored.config, "model": {**stored.config["model"], "vocab_size": 257}}
    manifest = stored.model_copy(update={"config": config, "identity": {**stored.identity, "data.tokenizer": BytesTokenizer().hash}})
    manifest = manifest.model_copy(update={"checksum": manifest.digest()})
    folder = tmp_path / "step-00000002"
    folder.mkdir()
    (folder / "manifest.json").write_text(manifest.model_dump_json(exclude={"weights_only"}))
    return folder


Asked = Callable[..., Evaluation]


@pytest.fixture
def asked(checkpoint: Path, tmp_path: Path) -> Asked:
    """asked(data, *overrides, …): what an evaluation of that checkpoint is resolved to."""

    def ask(data: object, *overrides: str, **options: Any) -> Evaluation:
        given: dict[str, Any] = {"num_procs": None, "batches": None, "split": "all", **options}
        return resolve_evaluation(checkpoint, str(data), [f"data.cache_dir={tmp_path / 'cache'}", *overrides], **given)

    return ask


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("some words to be evaluated, " * 37)
    return path


def test_every_token_but_the_first_is_predicted_once(asked: Asked, tmp_path: Path, words: Path) -> None:
    it = asked(words)
    t, span = it.config.train, it.task.span
    data = Windows(span, seq_length=t.seq_length, windows=it.task.batches * t.global_batch_size)
    ids = np.fromfile(f"{span.prefix}.bin", dtype=np.uint16)
    seen = np.concatenate([data[i]["labels"][data[i]["mask"] > 0] for i in range(len(data))])
    assert len(ids) > 32 * t.seq_length + 1 and len(data) == 40, "the last window must be the first of its batch"
    assert seen.tolist() == ids[1:].tolist() and it.whole
    before = np.concatenate([data[i]["tokens"][data[i]["mask"] > 0] for i in range(len(data))])
    assert before.tolist() == ids[:-1].tolist()
    assert data.counted(len(data)) == len(ids) - 1 and data.counted(2) == 2 * t.seq_length


def test_documents_apart_begin_without_a_label(asked: Asked, tmp_path: Path) -> None:
    """Each document's tokens are predicted once but its first, from places that begin at 0 again."""
    (tmp_path / "lines.jsonl").write_text("".join(f'{{"text": "{"abcdefgh"[: i % 9] * 7}"}}\n' for i in range(60)))
    it = asked(tmp_path / "lines.jsonl", "data.document_mask=true")
    t, span = it.config.train, it.task.span
    data = Windows(span, seq_length=t.seq_length, windows=it.task.batches * t.global_batch_size)
    ids = np.fromfile(f"{span.prefix}.bin", dtype=np.uint16)
    begins = np.concatenate([[True], ids[:-1] == 256])
    seen = np.concatenate([data[i]["labels"][data[i]["mask"] > 0] for i in range(len(data))])
    assert seen.tolist() == ids[~begins].tolist() and data.counted(len(data)) == len(seen)
    assert data.counted(2) == sum(int(data[i]["mask"].sum()) for i in range(2)) < 2 * t.seq_length
    for i in range(2):
        here = begins[i * t.seq_length : (i + 1) * t.seq_length]
        assert ((data[i]["positions"] == 0) == here)[1:].all() and data[i]["positions"][0] == 0


def test_it_starts_on_the_checkpoints_own_layout(asked: Asked, tmp_path: Path, words: Path) -> None:
    it = asked(words)
    assert it.processes >= 2 and it.config.parallel.tp == 2
    it.write(tmp_path)
    config, task = read(tmp_path)
    assert task == it.task and config.checkpoint.init_from == tmp_path / "step-00000002"
    assert (config.checkpoint.every, config.train.eval_every, config.log.wandb) == (0, 0, False)


def test_little_data_makes_a_small_batch(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "word.txt").write_text("word")
    it = asked(tmp_path / "word.txt", "train.global_batch_size=64", "parallel.tp=1", "parallel.pp=1", num_procs=1)
    assert it.task.batches == 1 and it.config.train.global_batch_size == it.config.train.micro_batch_size


def test_another_tokenizer_is_refused_with_both_names(asked: Asked, tmp_path: Path, words: Path) -> None:
    prepare(str(words), tokenizer="train:300", out=tmp_path / "other", workers=1, progress=False)
    with pytest.raises(DataError, match=r"made with tokenizer train:300 \(\d+ ids\), and .* was trained with bytes"):
        asked(tmp_path / "other")


def test_ids_beyond_the_vocabulary_are_refused(asked: Asked, tmp_path: Path, words: Path) -> None:
    prepare(str(words), tokenizer="bytes", out=tmp_path / "foreign", workers=1, progress=False)
    (tmp_path / "foreign.manifest.json").unlink()
    ids = np.memmap(tmp_path / "foreign.bin", dtype=np.uint16, mode="r+")
    ids[3] = 5000
    ids.flush()
    with pytest.raises(DataError, match=r"has ids up to 5,000, and the model of .* knows \d+: it was made with another tokenizer"):
        asked(tmp_path / "foreign")


def test_a_tokenizer_that_was_learned_from_data_elsewhere_is_asked_for(asked: Asked, tmp_path: Path, words: Path) -> None:
    with pytest.raises(DataError, match=r"is train:300, and the data that it was learned from is not here.* Set data.tokenizer=PREFIX"):
        asked(words, "data.tokenizer=train:300")


@pytest.mark.parametrize(
    ("data", "overrides", "options", "said"),
    [
        ("none.txt", [], {}, "none.txt"),
        ("words.txt", ["parallel.pp=3"], {"num_procs": 6}, "parallel.pp=3"),
        ("words.txt", ["parallel.tp=2", "parallel.pp=1"], {"num_procs": 1}, "parallel.tp=2"),
        ("words.txt", ["train.seq_length=100000"], {}, "train.seq_length=100000"),
        ("words.txt", [], {"split": "valid"}, "the valid split of"),
        ("words.txt", ["train.stepps=3"], {}, "train.stepps"),
    ],
)
def test_each_mistake_has_one_message(
    data: str,
    overrides: list[str],
    options: dict[str, Any],
    said: str,
    asked: Asked,
    tmp_path: Path,
    words: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ToolkitError) as error:
        asked(data, *overrides, **options)
    assert said in str(error.value) and "\n" not in str(error.value)
    if "parallel" in said:
        assert isinstance(error.value, LayoutError)


def test_an_index_with_overlaps_is_refused(tmp_path: Path, words: Path) -> None:
    prepare(str(words), tokenizer="bytes", out=tmp_path / "data", workers=1, progress=False)
    from toolkit.config.load import override_config
    from toolkit.data.dataset import open_members

    config = override_config(read_manifest(STORED).config, [f"data.source={tmp_path / 'data'}", f"data.cache_dir={tmp_path}"])
    member = open_members(config, prepare_missing=False)[0]
    with (tmp_path / "data.bin").open("ab") as file:
        file.write(b"ab" * 7)
    with pytest.raises(DataError, match=r"and its \.idx lists"):
        Span.of(member, split="all", weights=(1.0, 0.0, 0.0))
