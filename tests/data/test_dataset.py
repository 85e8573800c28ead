from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.conftest import make_texts, write_folder
from toolkit.config.schema import RunConfig
from toolkit.data.dataset import build_datasets, resolve_data, split_documents
from toolkit.data.manifest import manifest_path
from toolkit.data.prepare import prepare
from toolkit.errors import DataError

ROOT = Path(__file__).parents[2]
Build = Callable[..., RunConfig]


def samples(dataset: Any, count: int | None = None) -> np.ndarray:
    return np.stack([dataset[i]["text"] for i in range(len(dataset) if count is None else count)])


def built(config: RunConfig) -> tuple[Any, Any, Any]:
    return build_datasets(config, resolve_data(config, prepare_missing=False))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second set of bytes, all digits."""
    folder = tmp_path_factory.mktemp("other")
    prepare(str(write_folder(folder / "texts", ["0123456789" * 30] * 40)), out=folder / "digits")
    return folder / "digits"


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "bpe"
    prepare(str(corpus), out=out, tokenizer="train:280")
    return out


def test_a_text_source_is_prepared_once_and_found_again(config: Build, corpus: Path, prefix: Path) -> None:
    run = config(data={"source": str(corpus)})
    with pytest.raises(DataError, match=r"is not prepared.*toolkit data prepare"):
        resolve_data(run, prepare_missing=False)
    first = resolve_data(run, prepare_missing=True)
    assert resolve_data(run, prepare_missing=False) == first
    assert first.cache_dir == run.run.dir.parent / "data"
    assert (first.vocab_size, first.eod, first.tokenizer) == (257, 256, "bytes")
    known = resolve_data(config(), prepare_missing=False)
    assert known.prefixes == (str(prefix),)
    assert (known.tokens, known.entropy) == (first.tokens, first.entropy)


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_samples_are_megatron_cores(config: Build, prefix: Path, suffix: str) -> None:
    train, valid, test = built(config(data={"source": f"{prefix}{suffix}"}, train={"eval_every": 5, "eval_steps": 1}))
    assert len(train) >= 80 and len(valid) >= 8 and test is None
    from megatron.core.datasets.gpt_dataset import GPTDataset

    for i in range(5):
        tokens, labels = GPTDataset.__getitem__(train, i)["tokens"], GPTDataset.__getitem__(train, i)["labels"]
        assert train[i]["text"][:-1].tolist() == tokens.tolist()
        assert train[i]["text"][1:].tolist() == labels.tolist()


def test_documents_without_known_ends_are_not_kept_apart(config: Build, prefix: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"foreign{suffix}")
    foreign = {"source": str(tmp_path / "foreign"), "document_mask": True}
    with pytest.raises(DataError, match=r"document_mask=true, and which token ends a document of .*foreign is unknown.*Prepare it with"):
        resolve_data(config(data=foreign), prepare_missing=False)
    by_index = built(config(data=foreign | {"packing": "best_fit"}))[0]
    assert by_index[0]["loss_mask"].any()


def test_documents_longer_than_a_sample_are_named(config: Build, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    resolve_data(config(data={"document_mask": True, "packing": "best_fit"}), prepare_missing=False)
    assert any(
        r.message.startswith("data.packing=best_fit: 120 of 120 documents") and "train.seq_length=32" in r.message for r in caplog.records
    )


def test_no_validation_set_is_built_unless_asked_for(config: Build) -> None:
    train, valid, test = built(config())
    assert train is not None and valid is None and test is None


def test_order_depends_on_the_seed_alone(config: Build, tmp_path: Path) -> None:
    first = samples(built(config())[0], 80)
    elsewhere = config(run={"dir": tmp_path / "other" / "place"}, model={"hidden_size": 64}, train={"micro_batch_size": 1})
    assert np.array_equal(first, samples(built(elsewhere)[0], 80))
    assert not np.array_equal(first, samples(built(config(run={"seed": 7}))[0], 80))


def test_blend_mixes_by_weight(config: Build, prefix: Path, other: Path) -> None:
    run = config(data={"blend": {str(prefix): 1.0, str(other): 3.0}}, train={"steps": 20})
    data = resolve_data(run, prepare_missing=False)
    assert data.weights == (0.25, 0.75)
    train = build_datasets(run, data)[0]
    assert len(train) >= 160
    digits = sum(bool(np.isin(s, [*b"0123456789", 256]).all()) for s in samples(train, 160))
    assert abs(digits - 120) <= 1
    assert np.array_equal(samples(train, 160), samples(built(run)[0], 160))


@given(st.lists(st.floats(0, 1e6), min_size=3, max_size=3).filter(lambda s: s[0] > 1e-3), st.integers(1, 10**6))
def test_splits_are_cut_where_megatron_core_cuts(split: list[float], documents: int) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix, parse_and_normalize_split

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(",".join(f"{w:.12f}" for w in split)))
    for ours, theirs in zip(split_documents(tuple(split), documents), matrix, strict=True):
        edges = range(0) if theirs is None else range(round(theirs[0] * documents), round(theirs[1] * documents))
        # Weights are printed with twelve digits, so an edge may move by one document.
        assert len(edges) == 0 or (abs(ours.start - edges.start) <= 1 and abs(ours.stop - edges.stop) <= 1)


def _foreign(prefix: Path, folder: Path) -> Path:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", folder / f"foreign{suffix}")
    return folder / "foreign"


def test_foreign_data_is_read_and_its_largest_id_found(
    config: Build, prefix: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = config(data={"source": str(_foreign(prefix, tmp_path))})
    data = resolve_data(run, prepare_missing=False)
    assert (data.vocab_size, data.eod, data.tokenizer_hash) == (257, None, None)
    assert "has no manifest" in caplog.text
    assert data.entropy == pytest.approx(resolve_data(config(), prepare_missing=False).entropy)
    caplog.clear()
    assert resolve_data(run, prepare_missing=False) == data
    assert "has no manifest" not in caplog.text, "the scan is remembered"
    assert np.array_equal(samples(build_datasets(run, data)[0], 20), samples(built(config())[0], 20))


def _check(config: RunConfig, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        resolve_data(config, prepare_missing=False)
    assert error.value.fix, "says what to set"


def test_what_does_not_fit_is_refused_with_numbers(config: Build, prefix: Path, trained: Path, other: Path, tmp_path: Path) -> None:
    _check(config(model={"vocab_size": 256}), r"model\.vocab_size=256 is smaller than the 257 token ids")
    _check(config(data={"tokenizer": "train:300"}), r"data\.tokenizer=train:300 is not the tokenizer of .*made with bytes \(257 ids")
    _check(config(data={"source": str(trained), "tokenizer": "bytes"}), r"data\.tokenizer=bytes is not the tokenizer")
    _check(config(data={"blend": {str(prefix): 1, str(trained): 1}}), r"mixes tokenizers: bytes in .*, train:280 in")
    _check(config(data={"blend": {str(prefix): 1, str(tmp_path / "gone"): 1}}), "no such prepared prefix")
    _check(config(data={"source": None}), r"data\.source is null")
    _check(config(data={"source": str(tmp_path / "gone")}), "no such file or folder")
    _check(config(train={"seq_length": 10**6}), r"the train split of .* has \d+ tokens in 118 of 120 documents.*takes 1000001")
    _check(config(train={"eval_every": 1, "eval_steps": 1}, data={"split": [100, 0, 0]}), r"the valid split .* has 0 tokens in 0 of 120")
    _check(config(data={"source": f"{other}.nothing.bin"}), "does not exist")


def test_matching_tokenizers_are_accepted(config: Build, trained: Path, tmp_path: Path) -> None:
    for spec in ("train:280", f"{trained}.tokenizer.json"):
        assert resolve_data(config(data={"source": str(trained), "tokenizer": spec}), prepare_missing=False).tokenizer == "train:280"


def test_half_prepared_data_is_refused(config: Build, prefix: Path, tmp_path: Path) -> None:
    out = _foreign(prefix, tmp_path)
    (tmp_path / "foreign.work").mkdir()
    _check(config(data={"source": str(out)}), "half-prepared")


def test_spoilt_indices_are_built_anew(config: Build) -> None:
    run = config()
    first = samples(built(run)[0], 40)
    (folder,) = (run.run.dir.parent / "data" / "indices").iterdir()
    for act in ("cut", "marker", "none"):
        victim = next(folder.glob("*sample_index.npy"))
        if act == "cut":
            victim.write_bytes(victim.read_bytes()[:-8])
        if act == "marker":
            (folder / "complete.json").unlink()
            victim.write_bytes(b"")
        assert np.array_equal(samples(built(run)[0], 40), first)
        assert [p.name for p in folder.parent.iterdir()] == [folder.name], "no temporary folder is left"


def test_data_prepared_again_does_not_meet_old_indices(config: Build, tmp_path: Path) -> None:
    out = tmp_path / "set"
    prepare(str(write_folder(tmp_path / "a", make_texts(30, seed=1))), out=out)
    run = config(data={"source": str(out)})
    before = samples(built(run)[0], 20)
    prepare(str(write_folder(tmp_path / "b", make_texts(10, seed=2))), out=out, overwrite=True)
    after = built(run)[0]
    assert after.dataset.sequence_lengths.shape == (10,)
    assert not np.array_equal(samples(after, 20), before)
    assert manifest_path(out).exists()


RANKS = """
import dataclasses, json, pathlib, sys
import torch.distributed as dist
from toolkit.config.schema import RunConfig
from toolkit.data.dataset import build_datasets, resolve_data
from toolkit.errors import DataError
rank, store, raw = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
config = RunConfig.model_validate_json(raw)
data = resolve_data(config, prepare_missing=False)
train, _, _ = build_datasets(config, data)
result = {"samples": [train[i]["text"].tolist() for i in range(16)]}
try:
    build_datasets(config, dataclasses.replace(data, cache_dir=pathlib.Path("/proc/nowhere")))
except DataError as e:
    result["error"] = str(e)
own = data.cache_dir.with_name(f"cache-of-{rank}")  # as on hosts that share no disk
try:
    build_datasets(config, dataclasses.replace(data, cache_dir=own))
except DataError as e:
    result["unseen"] = str(e)
print(json.dumps(result))
"""


def test_ranks_read_the_same_and_fail_together(config: Build, prefix: Path, other: Path, tmp_path: Path) -> None:
    run = config(data={"blend": {str(prefix): 1.0, str(other): 1.0}})
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", RANKS]
    both = [
        subprocess.Popen([*command, str(r), str(tmp_path / "store"), run.model_dump_json()], env=env, stdout=subprocess.PIPE)
        for r in range(2)
    ]
    first, second = (json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in both)
    assert first == second
    assert "could not be written to /proc/nowhere" in first["error"]
    assert "does not see" in first["unseen"]
    assert np.array_equal(np.array(first["samples"]), samples(built(run)[0], 16)), "with and without process groups"


def test_resolving_needs_no_torch(config: Build) -> None:
    script = (
        "import sys\nfrom toolkit.config.schema import RunConfig\nfrom toolkit.data.dataset import resolve_data\n"
        "resolve_data(RunConfig.model_validate_json(sys.argv[1]), prepare_missing=True)\n"
        "print([m for m in ('torch', 'megatron', 'deepspeed', 'datasets', 'transformers') if m in sys.modules])"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", script, config().model_dump_json()], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
