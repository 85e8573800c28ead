"""Coordinates and ranks are inverse, follow megatron-core's order, and stages share out every layer once."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from toolkit.config.load import parse_config
from toolkit.parallel.layout import Coordinates, Layout, split_layers

degree = st.integers(1, 4)
layouts = st.builds(Layout, tp=degree, pp=degree, vpp=st.integers(1, 3), cp=st.integers(1, 3), dp=degree)


@given(layouts)
def test_coordinates_and_ranks_are_inverse(layout: Layout) -> None:
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size
    assert [layout.rank(at) for at in places] == list(range(layout.world_size))
    for at in places:
        assert 0 <= at.tp < layout.tp and 0 <= at.cp < layout.cp and 0 <= at.dp < layout.dp and 0 <= at.pp < layout.pp


def test_order_is_tp_cp_dp_pp() -> None:
    layout = Layout(tp=2, cp=3, dp=5, pp=7)
    at = Coordinates(tp=0, cp=0, dp=0, pp=0)
    assert layout.rank(at) == 0
    strides = [layout.rank(Coordinates(**{**at.__dict__, axis: 1})) for axis in ("tp", "cp", "dp", "pp")]
    assert strides == [1, 2, 6, 30]


@given(layouts, st.integers(1, 40))
def test_every_layer_lies_in_one_chunk(layout: Layout, count: int) -> None:
    assume(split_layers(count, layout.pp * layout.vpp))
    chunks = [layout.layers_of(count, stage=s, chunk=c) for c in range(layout.vpp) for s in range(layout.pp)]
    assert [layer for chunk in chunks for layer in chunk] == list(range(count))
    sizes = [len(chunk) for chunk in chunks]
    most = max(sizes)
    assert min(sizes) > 0 and all(size == most for size in sizes[1:-1]) and sizes[0] >= sizes[-1] >= most - 1


@pytest.mark.parametrize(
    ("layers", "chunks", "split"),
    [
        (8, 4, (2, 0)),
        (126, 16, (8, 2)),
        (7, 2, (4, 1)),
        (4, 3, (2, 2)),
        (5, 8, None),
        (6, 8, None),
        (7, 4, (2, 1)),
        (4, 5, None),
        (9, 7, None),
    ],
)
def test_the_ends_count_as_layers_where_layers_alone_do_not_divide(layers: int, chunks: int, split: tuple[int, int] | None) -> None:
    assert split_layers(layers, chunks) == split


def test_of_derives_dp_and_micro_batches() -> None:
    config = parse_config(
        {
            "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4},
            "parallel": {"tp": 2, "pp": 2, "sequence_parallel": True},
            "train": {"global_batch_size": 24, "micro_batch_size": 2},
        }
    )
    layout = Layout.of(config, 12)
    assert (layout.dp, layout.num_microbatches, layout.world_size, layout.sequence_parallel) == (3, 4, 12, True)
