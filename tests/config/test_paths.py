"""Paths of a YAML are looked for beside it first; a run cut short on the command line just runs;
two names for the data are refused.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from toolkit.config.load import dump_config, load_config, parse_config
from toolkit.data.dataset import resolve_data
from toolkit.data.prepare import prepare
from toolkit.errors import ConfigError

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
YAML = """
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4}
train: {steps: 100, global_batch_size: 4, seq_length: 32}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config and what it reads; the working folder is another one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    home = tmp_path / "home"
    home.mkdir()
    for name in ("words.txt", "tokenizer.json", "part.idx"):
        (home / name).touch()
    return home


def written(home: Path, more: str) -> Path:
    (home / "run.yaml").write_text(YAML + more)
    return home / "run.yaml"


def test_what_a_yaml_reads_is_looked_for_in_its_folder(home: Path) -> None:
    config = load_config(written(home, "data: {source: words.txt, tokenizer: tokenizer.json}\ncheckpoint: {init_from: .}\n"))
    assert (config.data.source, config.data.tokenizer) == (str(home / "words.txt"), str(home / "tokenizer.json"))
    assert config.checkpoint.init_from == home
    blend = load_config(written(home, "data: {blend: {part: 1.0, other: 2.0}}\n")).data.blend
    assert blend == {str(home / "part"): 1.0, "other": 2.0}, "a prepared prefix counts, and what is not there stays"


def test_what_is_not_there_is_looked_for_in_the_working_folder(home: Path) -> None:
    Path("mine.txt").touch()
    assert load_config(written(home, "data: {source: mine.txt}\n")).data.source == "mine.txt"


def test_overrides_and_places_to_write_are_of_the_working_folder(home: Path) -> None:
    (home / "runs").mkdir()
    config = load_config(written(home, "run: {dir: runs}\n"), ["data.source=words.txt"])
    assert (config.data.source, config.run.dir) == ("words.txt", Path("runs"))


def test_built_in_names_are_no_paths(home: Path) -> None:
    for name in ("python-stdlib", "bytes", "train:300"):
        (home / name).touch()
    config = load_config(written(home, "data: {source: python-stdlib, tokenizer: bytes}\n"))
    assert (config.data.source, config.data.tokenizer) == ("python-stdlib", "bytes")
    assert load_config(written(home, "data: {tokenizer: 'train:300'}\n")).data.tokenizer == "train:300"


def test_prepared_text_is_found_again_by_another_path_to_it(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(str(text), out=tmp_path / "data")
    monkeypatch.chdir(text.parent)
    assert prepare(text.name, out=tmp_path / "data") == first


def test_a_run_cut_short_on_the_command_line_has_its_share_of_warm_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, "optimizer: {warmup_steps: 20}\n")
    with caplog.at_level(logging.INFO, logger="toolkit.train"):
        assert load_config(path, ["train.steps=5"]).optimizer.warmup_steps == 1
    assert [record.message for record in caplog.records] == ["optimizer.warmup_steps=20 is shortened to 1, the same share of train.steps=5"]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="toolkit.train"):
        assert load_config(path, ["train.steps=50"]).optimizer.warmup_steps == 20
        assert load_config(path, ["train.steps=5", "optimizer.warmup_steps=7"]).optimizer.warmup_steps == 7, "the rules refuse it"
        assert load_config(path, {"train.steps": 5}).optimizer.warmup_steps == 1
    assert len(caplog.records) == 1


def test_source_beside_blend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"source=words\.txt beside blend: the two name the data twice"):
        parse_config({"model": MODEL, "data": {"source": "words.txt", "blend": {"a": 1.0}}})


def test_a_blend_alone_has_no_source_and_reads_back(tmp_path: Path) -> None:
    config = parse_config({"model": MODEL, "data": {"blend": {"a": 1.0}}})
    assert config.data.source is None
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.yaml") == config
    before = config.model_dump(mode="json")
    before["data"]["source"] = "python-stdlib"  # as earlier versions wrote it
    assert parse_config(before).data.source is None


def test_resolving_names_the_nearest_path(home: Path) -> None:
    (home / "data").mkdir()
    (home / "data" / "wiki.idx").touch()
    (home / "data" / "books.txt").touch()
    for name, near in (("data/wikj", "data/wiki"), ("data/book.txt", "data/books.txt"), ("./data/wiky", "./data/wiki")):
        config = parse_config({"model": MODEL, "data": {"source": str(home / name) if name[0] == "." else name}})
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(home)
            with pytest.raises(Exception, match=f"not found. Did you mean .*{near.removeprefix('./')}[?]"):
                resolve_data(config, prepare_missing=True)
