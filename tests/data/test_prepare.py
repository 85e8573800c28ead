from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
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


PREPARE = """
import logging, os, signal, sys
from pathlib import Path
from toolkit.data.prepare import prepare
logging.basicConfig(level=logging.INFO)
out, here, stopped = Path(sys.argv[1]), os.getpid(), []
work = out.with_name(out.name + ".work")
def stop(event, _):
    if event == "open" and not stopped and os.getpid() == here and {moment}:
        stopped.append(True)
        os.kill(here, signal.SIGSTOP)
sys.addaudithook(stop)
prepare(sys.argv[2], out=out, workers=int(sys.argv[3]), tokenizer=sys.argv[4], shard_bytes=int(sys.argv[5]))
"""


def start(
    source: Path, out: Path, *, workers: int = 1, tokenizer: str = "train:300", shard_bytes: int = SMALL, stop_when: str = "False"
) -> subprocess.Popen[bytes]:
    """Prepare in a process of its own. stop_when: an expression in `work`; the process stops itself
    at the first file it opens after that.
    """
    arguments = [str(out), str(source), str(workers), tokenizer, str(shard_bytes)]
    command = [sys.executable, "-c", PREPARE.replace("{moment}", stop_when), *arguments]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)


def wait_until_stopped(process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert process.poll() is None and time.monotonic() < end, "it finished before it could be stopped"
        time.sleep(0.01)


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


def _parts(number: int) -> str:
    return f"len(list(work.glob('part-*.json'))) >= {number}"


@pytest.mark.parametrize(
    ("workers", "moment"),
    [(1, _parts(1)), (1, _parts(30)), (2, _parts(5)), (1, "(work / 'all.bin').exists()")],
    ids=["first-part", "later", "two-workers", "assembling"],
)
def test_a_killed_prepare_goes_on(
    corpus: Path, reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int, moment: str
) -> None:
    out, work = tmp_path / "the-one", tmp_path / "the-one.work"
    process = start(corpus, out, workers=workers, stop_when=moment)
    wait_until_stopped(process)
    process.kill()
    process.communicate()
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
    process = start(corpus, out, workers=2, shard_bytes=200, stop_when=_parts(3))
    wait_until_stopped(process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    os.kill(int(children[0]), signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"an encoding process ended with code -9" in stderr
    assert len(list(work.glob("part-*.json"))) >= 3


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
    process = start(source, out, tokenizer="bytes", shard_bytes=300, stop_when=_parts(20))
    wait_until_stopped(process)
    process.kill()
    process.communicate()
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
