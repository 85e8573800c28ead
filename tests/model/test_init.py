"""Initial weights are functions of the seed and the global name: cut pieces put together are the whole."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.arch.spec import Cut, WeightSpec
from toolkit.config.load import parse_config
from toolkit.model.init import cut_out, draw

CPU = torch.device("cpu")


@given(
    tp=st.sampled_from([1, 2, 3, 4]),
    blocks=st.sampled_from([1, 2]),
    rows=st.integers(1, 4),
    columns=st.integers(1, 5),
    dim=st.sampled_from([None, 0, 1]),
)
def test_cut_pieces_make_the_whole(tp: int, blocks: int, rows: int, columns: int, dim: int | None) -> None:
    cut = Cut(dim, blocks if dim == 0 else 1)
    full = torch.arange(rows * tp * 2 * columns * tp).view(rows * tp * 2, columns * tp)
    pieces = [cut_out(cut, full, tp=tp, rank=r) for r in range(tp)]
    assert all(cut.whole(p.shape, tp) == list(full.shape) and cut.part(full.shape, tp) == list(p.shape) for p in pieces)
    if dim is None:
        assert all(torch.equal(p, full) for p in pieces)
        return
    chunks = [p.chunk(cut.blocks, dim) for p in pieces]
    again = torch.cat([torch.cat([c[b] for c in chunks], dim) for b in range(cut.blocks)], dim)
    assert torch.equal(again, full)


def weight(name: str) -> WeightSpec:
    model = {"family": "gpt", "num_layers": 8, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    return parse_config({"model": model}).model.spec.weight(name)


def test_names_and_seeds_decide() -> None:
    def value(name: str, seed: int) -> torch.Tensor:
        return draw(weight(name), seed=seed, std=0.02, num_layers=8, device=CPU)

    name = "decoder.layers.3.mlp.linear_fc1.weight"
    assert torch.equal(value(name, 1), value(name, 1))
    assert not torch.equal(value(name, 1), value(name, 2))
    assert not torch.equal(value(name, 1), value("decoder.layers.4.mlp.linear_fc1.weight", 1))
    assert abs(float(value(name, 1).std()) - 0.02) < 0.001
    assert abs(float(value("decoder.layers.3.mlp.linear_fc2.weight", 1).std()) - 0.02 / 4) < 0.0003


def test_vectors() -> None:
    for name, constant in (("decoder.final_layernorm.weight", 1.0), ("decoder.layers.0.mlp.linear_fc1.bias", 0.0)):
        value = draw(weight(name), seed=1, std=1, num_layers=1, device=CPU)
        assert set(value.tolist()) == {constant}
