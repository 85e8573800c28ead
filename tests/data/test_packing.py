"""Best-fit packing: every token once, nothing cut that fits, little room lost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_dataset import Build, built
from toolkit.data.documents import cut_at_ends, laid_end_to_end, positions_of
from toolkit.data.indexed import read_index
from toolkit.data.packing import best_fit, cut_long
from toolkit.errors import ConfigError


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=200),
    size=st.integers(1, 30),
    seed=st.integers(0, 3),
)
def test_every_token_once_and_nothing_cut_that_fits(lengths: list[int], size: int, seed: int) -> None:
    packs = best_fit(np.array(lengths), size, random=np.random.RandomState(seed))
    seen = [np.zeros(length, int) for length in lengths]
    for i in range(len(packs)):
        pieces = packs.pieces[packs.bounds[i] : packs.bounds[i + 1]]
        assert 0 < pieces[:, 2].sum() <= size
        for document, first, count in pieces:
            assert count == lengths[document] or lengths[document] > size
            seen[document][first : first + count] += 1
    assert all((tokens == 1).all() for tokens in seen)
    # of two samples, the documents of one never fit into the other's room: else the second had not been begun
    fill = sorted(packs.pieces[a:b, 2].sum() for a, b in pairwise(packs.bounds))
    assert len(fill) < 2 or fill[0] + fill[1] > size


def test_best_fit_takes_the_least_room() -> None:
    """7 and 6 begin samples of 10, of which 3 fills the first."""
    packs = best_fit(np.array([3, 7, 6]), 10, random=np.random.RandomState(0))
    found = {tuple(sorted(packs.pieces[a:b, 2])) for a, b in pairwise(packs.bounds)}
    assert found == {(3, 7), (6,)}


def test_long_documents_are_cut_into_whole_samples_and_a_rest() -> None:
    assert cut_long(np.array([5, 0, 23]), 10).tolist() == [[0, 0, 5], [2, 0, 10], [2, 10, 10], [2, 20, 3]]


@pytest.mark.parametrize("size", [64, 300])
def test_an_epoch_of_samples(config: Build, prefix: object, size: int) -> None:
    """As a run reads them: each token of the file once an input, and once a label unless it begins
    a document.
    """
    index = read_index(str(prefix))
    ids = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    run = config(
        train={"seq_length": size, "steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        data={"document_mask": True, "packing": "best_fit", "split": (100, 0, 0)},
    )
    train = built(run)[0]
    inputs, labels, room = [], [], 0
    for i in range(len(train)):
        sample = train[i]
        starts = np.flatnonzero(sample["positions"] == 0)
        assert (positions_of(sample["positions"] == 0) == sample["positions"]).all()
        last = [*starts[1:], size]
        for a, b in zip(starts, last, strict=True):
            tokens, mask = sample["tokens"][a:b], sample["loss_mask"][a:b].astype(bool)
            if not mask.any() and tokens[0] != 256:
                room += b - a
                assert not tokens.any() and b == size, "padding ends a sample"
                continue
            assert (sample["labels"][a : b - 1] == tokens[1:]).all() and mask[:-1].all()
            assert mask[-1] == (tokens[-1] != 256), "the last token of a document has no label"
            inputs += tokens.tolist()
            labels += sample["labels"][a:b][mask].tolist()
    assert np.bincount(inputs, minlength=257).tolist() == np.bincount(ids, minlength=257).tolist()
    assert len(labels) == index.tokens - index.documents
    assert room < 0.15 * len(train) * size


def test_another_epoch_packs_anew(config: Build) -> None:
    small = {"seq_length": 300, "steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    data = {"document_mask": True, "packing": "best_fit"}
    one = built(config(train=small, data=data))[0]
    two = built(config(train=small | {"steps": len(one) + 1}, data=data))[0]
    assert len(two) >= len(one) + 1
    assert all((one[i]["tokens"] == two[i]["tokens"]).all() for i in range(len(one)))
    again = built(config(train=small, data=data, run={"seed": 5}))[0]
    assert any((one[i]["tokens"] != again[i]["tokens"]).any() for i in range(len(one)))


def test_concat_is_cut_at_ends() -> None:
    sample = cut_at_ends(np.array([5, 6, 9, 7, 9, 9, 8, 4]), eod=9)
    assert sample["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert sample["loss_mask"].tolist() == [1, 1, 0, 1, 0, 0, 1]
    assert sample["labels"].tolist() == [6, 9, 7, 9, 9, 8, 4]


def test_a_cut_document_keeps_its_next_label() -> None:
    sample = laid_end_to_end([np.array([5, 6, 7]), np.array([8, 9])], [False, True], seq_length=5)
    assert sample["tokens"].tolist() == [5, 6, 8, 9, 0]
    assert sample["labels"].tolist() == [6, 7, 9, 0, 0]
    assert sample["loss_mask"].tolist() == [1, 1, 1, 0, 0]
    assert sample["positions"].tolist() == [0, 1, 0, 1, 0]


def test_packing_without_a_mask_is_refused() -> None:
    from toolkit.config.load import parse_config

    with pytest.raises(ConfigError, match=r"packing=best_fit with document_mask=false.*Set document_mask to true, or packing to concat"):
        parse_config({"model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}, "data": {"packing": "best_fit"}})
