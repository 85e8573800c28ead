from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from toolkit.data.sources import open_source
from toolkit.errors import DataError


def read(path: Path, **options: str) -> list[str]:
    return list(open_source(str(path), **options).documents())


def test_built_in_corpus_is_python_text_in_a_fixed_order() -> None:
    source = open_source("python-stdlib")
    names = [p.name for p in source.files]
    assert "argparse.py" in names and "ast.py" in names
    assert not any({"test", "site-packages"} & set(p.parts[-3:-1]) for p in source.files)
    assert source.files == open_source("python-stdlib").files
    assert source.fingerprint == open_source("python-stdlib").fingerprint
    assert "ArgumentParser" in dict(zip(names, source.documents(), strict=True))["argparse.py"]


def test_every_format_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / ".hidden [1]"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"one\r\ntwo \xff\n")
    rows = [
        {"text": "x", "meta": 1},
        {"text": "", "other": {"a": 2}},
        {"text": "lone \ud800 surrogate"},
        {"text": None, "meta": "str"},
        {"text": "a\u2028b\n"},
    ]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    with gzip.open(folder / "c.jsonl.gz", "wt") as f:
        f.write("\n".join(json.dumps({"text": f"row {i}"}) for i in range(3)))
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["p1", None]}), folder / "d.parquet")
    (folder / "ignored.csv").write_text("no")
    assert read(folder) == ["one\r\ntwo \ufffd\n", "x", "", "lone ? surrogate", "", "a\u2028b\n", "row 0", "row 1", "row 2", "p1", ""]


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = open_source(str(path)).fingerprint
    assert open_source(str(path)).fingerprint == first
    path.write_text("other")
    assert open_source(str(path)).fingerprint != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "ok"}\n{"text": \n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", '["text"]\n', "JSON list"),
        ("a.jsonl", '{"body": "x", "id": 3}\n', "row 1 has no field 'text': its fields are: body, id"),
        ("a.jsonl", '{"text": 3}\n', "'text' is of type int"),
        ("a.jsonl.gz", "not gzip", "a.jsonl.gz"),
        ("a.parquet", "not parquet", "a.parquet could not be read"),
        ("a.csv", "x", "does not end in"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_another_text_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    assert read(tmp_path, text_key="body") == ["x"]


@pytest.mark.parametrize("spec", ["/no/such/place", "./gone.txt", "missing.jsonl", "two words", "a/b/c"])
def test_missing_paths(spec: str) -> None:
    with pytest.raises(DataError, match=r"Set data\.source to"):
        open_source(spec)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file"):
        open_source(str(tmp_path))


def test_unreachable_hub_is_a_data_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data\.source=some-org/no-data could not be read"):
        list(open_source("some-org/no-data").documents())
