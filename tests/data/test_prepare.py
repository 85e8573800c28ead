from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.conftest import make_texts, write_folder
from toolkit.data.indexed import read_index
from toolkit.data.manifest import load_manifest, tokenizer_of
from toolkit.data.prepare import prepare
from toolkit.errors import DataError

ROOT = Path(__file__).parents[2]
SMALL = 600  # bytes of text in a shard, so that there are many


def contents(prefix: Path) -> dict[str, bytes]:
    """Every file of a data set by suffix; names inside the manifest are made equal."""
    files = {p.name.removeprefix(prefix.name): p.read_bytes() for p in prefix.parent.glob(f"{prefix.name}.*") if p.is_file()}
    return {k: v.replace(prefix.name.encode(), b"PREFIX") for k, v in files.items()}


def start(source: Path, out: Path, *, workers: int = 1, tokenizer: str = "train:300", shard_bytes: int = SMALL) -> subprocess.Popen[bytes]:
    call = f"prepare({str(source)!r}, out={str(out)!r}, workers={workers}, tokenizer={tokenizer!r}, shard_bytes={shard_bytes})"
    script = f"import logging\nlogging.basicConfig(level=logging.INFO)\nfrom toolkit.data.prepare import prepare\n{call}\n"
    return subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "the-one"
    prepare(str(corpus), out=out, tokenizer="train:300", shard_bytes=SMALL)
    return out


def test_ids_are_those_of_the_documents(corpus: Path, reference: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    manifest = load_manifest(reference, verify="hashes")
    tok = tokenizer_of(manifest, reference)
    texts = [p.read_bytes().decode() for p in sorted(corpus.iterdir())]
    data = IndexedDataset(str(reference))
    assert [tok.decode(document[:-1]) for document in data[:]] == texts
    assert all(document[-1] == tok.eod and tok.eod not in document[:-1] for document in data[:])
    assert (manifest.documents, manifest.tokens) == (len(texts), sum(map(len, data[:])))
    assert (manifest.characters, manifest.bytes) == (sum(map(len, texts)), sum(len(t.encode()) for t in texts))
    assert manifest.tokenizer.hash == tok.hash
    counts = np.bincount(np.concatenate(data[:]))
    p = counts[counts > 0] / counts.sum()
    assert manifest.entropy == pytest.approx(float(-(p * np.log(p)).sum()))


def test_workers_do_not_change_a_byte(corpus: Path, reference: Path, tmp_path: Path) -> None:
    prepare(str(corpus), out=tmp_path / "the-other", tokenizer="train:300", workers=2, shard_bytes=SMALL)
    assert contents(tmp_path / "the-other") == contents(reference)


def _parts(number: int) -> Callable[[Path], bool]:
    return lambda work: len(list(work.glob("part-*.json"))) >= number


@pytest.mark.parametrize(
    ("workers", "moment"),
    [(1, _parts(1)), (1, _parts(30)), (2, _parts(5)), (1, lambda work: (work / "all.bin").exists())],
    ids=["first-part", "later", "two-workers", "assembling"],
)
def test_a_killed_prepare_goes_on(
    corpus: Path, reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int, moment: Callable[[Path], bool]
) -> None:
    out, work = tmp_path / "the-one", tmp_path / "the-one.work"
    process = start(corpus, out, workers=workers)
    while process.poll() is None and not moment(work):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it finished before it could be killed"
    with pytest.raises(DataError, match="preparing did not finish"):
        load_manifest(out)
    done = {p: p.stat().st_mtime_ns for p in work.glob("part-*.json")}
    assert done
    with caplog.at_level("INFO"):
        prepare(str(corpus), out=out, tokenizer="train:300", workers=workers, shard_bytes=SMALL)
    assert contents(out) == contents(reference)
    assert "shards were already encoded" in caplog.text
    assert not work.exists()


def test_a_killed_helper_is_an_error_and_its_shards_are_kept(corpus: Path, reference: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "the-one", tmp_path / "the-one.work"
    process = start(corpus, out, workers=2, shard_bytes=200)
    while process.poll() is None and not _parts(3)(work):
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    os.kill(int(children[0]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"an encoding process ended with code -9" in stderr
    assert _parts(3)(work)


def test_two_at_once_share_one_result(corpus: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "the-one"
    both = [start(corpus, out) for _ in range(2)]
    logs = [p.communicate(timeout=120)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], logs
    assert sum(b"reusing it" in log for log in logs) == 1
    assert contents(out) == contents(reference)


def test_finished_data_is_reused_and_other_data_is_not_overwritten(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "texts", make_texts(5)), tmp_path / "out"
    first = prepare(str(source), out=out)
    stamp = out.with_suffix(".bin").stat().st_mtime_ns
    assert prepare(str(source), out=out) == first
    assert out.with_suffix(".bin").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match=r"with tokenizer bytes: not .* with tokenizer train:280.*--overwrite"):
        prepare(str(source), out=out, tokenizer="train:280")
    (source / "more.txt").write_text("more")
    with pytest.raises(DataError, match="has changed since"):
        prepare(str(source), out=out)
    assert prepare(str(source), out=out, overwrite=True).documents == 6
    # Damage is repaired without asking.
    out.with_suffix(".bin").write_bytes(b"")
    assert prepare(str(source), out=out).documents == 6
    load_manifest(out, verify="hashes")


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "texts", make_texts(2))
    (tmp_path / "out.bin").write_bytes(b"precious")
    with pytest.raises(DataError, match="made by something else"):
        prepare(str(source), out=tmp_path / "out")
    assert (tmp_path / "out.bin").read_bytes() == b"precious"


def test_a_changed_source_is_not_mixed_with_old_parts(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "texts", make_texts(60)), tmp_path / "out"
    process = start(source, out, tokenizer="bytes", shard_bytes=300)
    while process.poll() is None and not _parts(20)(tmp_path / "out.work"):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (source / "0000.txt").write_text("now something else")
    prepare(str(source), out=out, shard_bytes=300)
    prepare(str(source), out=tmp_path / "fresh", shard_bytes=300)
    assert contents(out) == contents(tmp_path / "fresh")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=30), min_size=1, max_size=12), st.integers(1, 100))
def test_any_documents_come_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str], shard_bytes: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    folder = tmp_path_factory.mktemp("any")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    full = [t for t in texts if t]
    if not full:
        with pytest.raises(DataError, match="yields no tokens"):
            prepare(str(folder / "in.jsonl"), out=folder / "out")
        return
    manifest = prepare(str(folder / "in.jsonl"), out=folder / "out", shard_bytes=shard_bytes)
    tok = tokenizer_of(manifest, folder / "out")
    data = IndexedDataset(str(folder / "out"))  # named, since its arrays point into files that it unmaps when it goes
    assert [tok.decode(d) for d in data[:]] == full
    assert manifest.skipped == len(texts) - len(full)
    assert read_index(folder / "out").tokens == manifest.tokens


def test_unwritable_place(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "texts", make_texts(2))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        prepare(str(source), out=tmp_path / "file" / "out")
