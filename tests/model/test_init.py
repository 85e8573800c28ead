"""Initial weights are functions of the seed and the global name: cut pieces put together are the whole."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.model.init import Shard, draw

CPU = torch.device("cpu")


@given(
    tp=st.sampled_from([1, 2, 3, 4]),
    blocks=st.sampled_from([1, 2]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 5),
    dim=st.sampled_from([None, 0, 1]),
)
def test_cut_pieces_make_the_whole(tp: int, blocks: int, rows: int, columns: int, dim: int | None) -> None:
    shard = Shard(dim, blocks if dim == 0 else 1)
    full = torch.arange(rows * tp * 2 * columns * tp).view(rows * tp * 2, columns * tp)
    pieces = [shard.cut(full, tp=tp, rank=r) for r in range(tp)]
    assert all(shard.whole(p.shape, tp) == list(full.shape) for p in pieces)
    if dim is None:
        assert all(torch.equal(p, full) for p in pieces)
        return
    cut = [p.chunk(shard.blocks, dim) for p in pieces]
    again = torch.cat([torch.cat([c[b] for c in cut], dim) for b in range(shard.blocks)], dim)
    assert torch.equal(again, full)


def test_names_and_seeds_decide() -> None:
    def weight(name: str, seed: int) -> torch.Tensor:
        return draw(name, [64, 64], seed=seed, std=0.02, num_layers=8, device=CPU)

    name = "decoder.layers.3.mlp.linear_fc1.weight"
    assert torch.equal(weight(name, 1), weight(name, 1))
    assert not torch.equal(weight(name, 1), weight(name, 2))
    assert not torch.equal(weight(name, 1), weight("decoder.layers.4.mlp.linear_fc1.weight", 1))
    assert abs(float(weight(name, 1).std()) - 0.02) < 0.001
    assert abs(float(weight("decoder.layers.3.mlp.linear_fc2.weight", 1).std()) - 0.02 / 4) < 0.0003


def test_vectors() -> None:
    assert draw("decoder.final_layernorm.weight", [4], seed=1, std=1, num_layers=1, device=CPU).tolist() == [1.0] * 4
    assert draw("decoder.layers.0.mlp.linear_fc1.bias", [4], seed=1, std=1, num_layers=1, device=CPU).tolist() == [0.0] * 4
