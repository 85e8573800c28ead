from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.data.indexed import count_ids, entropy, read_index
from toolkit.data.manifest import load_manifest
from toolkit.errors import DataError

several = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def copy(prefix: Path, tmp_path: Path) -> Path:
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / prefix.name


def test_whole_files_agree_with_megatron_core(prefix: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    index, reference = read_index(prefix), IndexedDataset(str(prefix))
    assert np.array_equal(index.lengths, reference.sequence_lengths)
    assert index.dtype == reference.index.dtype
    assert index.tokens == sum(len(reference[i]) for i in range(len(reference)))
    assert count_ids(index).tolist() == np.bincount(np.concatenate(reference[:])).tolist()


def test_entropy_is_that_of_the_counts() -> None:
    assert entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(np.log(4))
    assert entropy(np.array([0, 7])) == 0.0
    assert entropy(np.array([1, 3])) == pytest.approx(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)))


@several
@given(st.data())
def test_any_cut_is_noticed(copy: Path, data: st.DataObject) -> None:
    path = copy.with_name(copy.name + data.draw(st.sampled_from([".idx", ".bin"])))
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    try:
        with pytest.raises(DataError) as error:
            read_index(copy)
        assert path.name in str(error.value)
    finally:
        path.write_bytes(whole)


@several
@given(st.data())
def test_any_changed_byte_of_the_index_is_noticed_or_harmless(copy: Path, data: st.DataObject) -> None:
    path = copy.with_suffix(".idx")
    whole = path.read_bytes()
    changed = bytearray(whole)
    place = data.draw(st.integers(0, len(whole) - 1))
    changed[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        index = read_index(copy)
        ids = np.memmap(f"{copy}.bin", dtype=index.dtype, mode="r")
        assert index.lengths.min() >= 0
        assert index.lengths.max() <= len(ids)
    except DataError as e:
        assert path.name in str(e)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"GARBAGE!!", "is not a Megatron index"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x07", "dtype code 7"),
        (18, struct.pack("<Q", 0), "its header promises"),
        (18, struct.pack("<Q", 2**62), "cut short"),
        (34, struct.pack("<i", -5), "negative"),
        (34, struct.pack("<i", 2**31 - 1), "points to byte"),
        (34 + 4 * 120, struct.pack("<q", 2**63 - 2), "points to byte"),
    ],
)
def test_damage_is_described(copy: Path, place: int, value: bytes, message: str) -> None:
    data = bytearray(copy.with_suffix(".idx").read_bytes())
    data[place : place + len(value)] = value
    copy.with_suffix(".idx").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_index(copy)


def _spoil(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


@pytest.mark.parametrize(
    ("suffix", "act", "message"),
    [
        (".manifest.json", Path.unlink, "does not exist"),
        (".manifest.json", _spoil("{"), "is not a manifest"),
        (".manifest.json", _spoil('{"source": "x"}'), "is not a manifest"),
        (".idx", Path.unlink, "is missing"),
        (".bin", _spoil("short"), "cut short or was changed"),
    ],
)
def test_manifest_holds_its_files_to_account(copy: Path, suffix: str, act: Callable[[Path], object], message: str) -> None:
    act(copy.with_name(copy.name + suffix))
    with pytest.raises(DataError, match=message):
        load_manifest(copy)


def test_hashes_notice_what_sizes_do_not(copy: Path) -> None:
    path = copy.with_suffix(".bin")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    load_manifest(copy)
    with pytest.raises(DataError, match="does not match its sha256"):
        load_manifest(copy, verify="hashes")
