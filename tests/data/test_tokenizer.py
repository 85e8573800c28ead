from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.conftest import make_texts
from toolkit.data.tokenizer import END_OF_DOCUMENT, BytesTokenizer, SubwordTokenizer, load_tokenizer, spread
from toolkit.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def trained() -> SubwordTokenizer:
    tok = load_tokenizer("train:300", train_on=make_texts(50))
    assert isinstance(tok, SubwordTokenizer)
    return tok


@given(TEXT)
def test_bytes_round_trip(text: str) -> None:
    tok = BytesTokenizer()
    (ids,) = tok.encode_batch([text])
    assert len(ids) == len(text.encode())
    assert tok.decode([*ids, tok.eod]) == text
    assert (tok.vocab_size, tok.eod) == (257, 256)


@given(TEXT)
def test_trained_round_trip(trained: SubwordTokenizer, text: str) -> None:
    (ids,) = trained.encode_batch([text])
    assert trained.decode(ids) == text
    assert all(i < trained.vocab_size for i in ids)


def test_training_is_reproducible_in_another_process(trained: SubwordTokenizer) -> None:
    script = (
        "from tests.data.conftest import make_texts\nfrom toolkit.data.tokenizer import load_tokenizer\n"
        "print(load_tokenizer('train:300', train_on=make_texts(50)).hash)"
    )
    root = Path(__file__).parents[2]
    other = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env={"PYTHONPATH": str(root), "PYTHONHASHSEED": "7"}, capture_output=True, check=True
    )
    assert other.stdout.decode().strip() == trained.hash
    assert trained.vocab_size == 300
    assert trained.decode([trained.eod]) == END_OF_DOCUMENT


def test_trained_is_kept_and_read_back(tmp_path: Path) -> None:
    kept = tmp_path / "tokenizer.json"
    first = load_tokenizer("train:280", train_on=make_texts(10), cache=kept)
    assert load_tokenizer("train:280", cache=kept).hash == first.hash
    assert load_tokenizer(str(kept)).hash == first.hash
    with pytest.raises(DataError, match="no text to train"):
        load_tokenizer("train:280")


def test_hash_ignores_the_layout_of_the_json_only(trained: SubwordTokenizer) -> None:
    content = json.loads(trained.json or "")
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    # As older versions of tokenizers write merges.
    content["model"]["merges"] = [" ".join(m) for m in content["model"]["merges"]]
    same = SubwordTokenizer("x", text=json.dumps(content, indent=3))
    assert same.hash == trained.hash
    long = make_texts(1, seed=5)
    assert np.array_equal(same.encode_batch(long)[0], trained.encode_batch(long)[0]), "truncation must be off"
    content["model"]["merges"].pop()
    assert SubwordTokenizer("x", text=json.dumps(content)).hash != trained.hash


def test_end_of_document_comes_from_the_config_or_is_added(tmp_path: Path, trained: SubwordTokenizer) -> None:
    content = json.loads(trained.json or "")
    content["added_tokens"] = [t | {"content": "<stop>"} for t in content["added_tokens"]]
    content["model"]["vocab"] = {("<stop>" if k == END_OF_DOCUMENT else k): v for k, v in content["model"]["vocab"].items()}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    added = load_tokenizer(str(path))
    assert (added.eod, added.vocab_size) == (300, 301)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    for spec in (path, tmp_path):
        named = load_tokenizer(str(spec))
        assert (named.eod, named.vocab_size) == (0, 300)
    with pytest.raises(DataError, match="no token '<nope>'"):
        load_tokenizer(str(path), eod="<nope>")


needs_gigatoken = pytest.mark.skipif(importlib.util.find_spec("gigatoken") is None, reason="gigatoken is not installed")


@needs_gigatoken
@given(st.lists(TEXT, min_size=1, max_size=5))
def test_fast_path_gives_the_same_ids(trained: SubwordTokenizer, texts: list[str]) -> None:
    assert trained.fast_agrees(texts)
    for fast, slow in zip(trained.encode_batch(texts, fast=True), trained.encode_batch(texts), strict=True):
        assert np.array_equal(fast, slow)


@needs_gigatoken
def test_fast_path_is_refused_where_ids_differ(trained: SubwordTokenizer) -> None:
    other = SubwordTokenizer(trained.spec, text=trained.json or "")
    other.__dict__["_fast"] = load_tokenizer("train:280", train_on=make_texts(50))._fast  # type: ignore[attr-defined]
    assert not other.fast_agrees(make_texts(3))


@given(st.integers(1, 100))
def test_spread_takes_from_all_over(count: int) -> None:
    texts = list(map(str, range(count)))
    sample = spread(texts)
    assert len(sample) == min(8, count)
    assert len(set(sample)) == len(sample)
    assert count < 16 or int(sample[-1]) >= count // 2


@pytest.mark.parametrize("spec", ["train:", "train:256", "train:x", "missing.json", "./nowhere", "a b c", ""])
def test_bad_specs_are_data_errors(spec: str) -> None:
    with pytest.raises(DataError, match="Set "):
        load_tokenizer(spec, train_on=["text"])


def test_damaged_file_is_a_data_error(tmp_path: Path, trained: SubwordTokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text((trained.json or "")[:-40])
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(str(path))


def test_unreachable_hub_is_a_data_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"data\.tokenizer=some-org/no-model could not be loaded"):
        load_tokenizer("some-org/no-model")


def test_a_mistyped_path_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "llama").mkdir()
    with pytest.raises(DataError, match=r"data.tokenizer=models/lama is not found. Did you mean models/llama\?"):
        load_tokenizer("models/lama")
