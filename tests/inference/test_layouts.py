"""Greedy tokens are those of transformers, and drawn ones those of one process, however the model is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.convert import models  # noqa: E402

TOKENS = "tests.inference.run:tokens"
FAMILIES = ["gpt", "llama", "mistral", "qwen2", "qwen3"]
ONE: tuple[int, list[str]] = (1, [])
TP2, PP2, DP2 = (2, ["parallel.tp=2"]), (2, ["parallel.pp=2"]), (2, [])
TP2_PP2, TP2_DP2 = (4, ["parallel.tp=2", "parallel.pp=2"]), (4, ["parallel.tp=2"])
# each family on one process and cut both ways; each way of cutting with the two kinds of positions
USUAL = [(f, "one") for f in FAMILIES] + [(f, "tp2 pp2") for f in FAMILIES] + [("llama", "dp2"), ("llama", "tp2"), ("gpt", "pp2")]
LAYOUTS = {"one": ONE, "tp2": TP2, "pp2": PP2, "dp2": DP2, "tp2 pp2": TP2_PP2, "tp2 dp2": TP2_DP2}
CELLS = [
    pytest.param(f, name, marks=() if (f, name) in USUAL else pytest.mark.all_cells, id=f"{f}-{name}") for f in FAMILIES for name in LAYOUTS
]
NEW = 10


def prompts(vocab: int) -> list[list[int]]:
    """Five prompts of 1 to 9 ids."""
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocab, (n,), generator=draw).tolist() for n in (4, 1, 9, 2, 6)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of a family as its Hugging Face folder, and what transformers goes on with after each
    prompt.
    """
    known: dict[str, tuple[Path, list[list[int]]]] = {}

    def make(family: str) -> tuple[Path, list[list[int]]]:
        if family not in known:
            shape = models.draw(FAMILIES.index(family) + 20, even=True)
            if family == "gpt":
                model = models.gpt2(n_head=6)
            elif family == "llama":
                model = models.llama(**shape)
            else:
                model = models.like_llama(family, **shape)
            folder = models.saved(model, tmp_path_factory.mktemp(family) / "hf")
            known[family] = folder, [_theirs(model, ids) for ids in prompts(model.config.vocab_size)]
        return known[family]

    return make


def _theirs(model: Any, ids: list[int]) -> list[int]:
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return out[0, len(ids) :].tolist()


def _ours(pool: Pool, folder: Path, layout: tuple[int, list[str]], **more: Any) -> list[tuple[list[int], str]]:
    from transformers import AutoConfig

    ids = prompts(AutoConfig.from_pretrained(folder).vocab_size)
    asked = {"model": str(folder), "overrides": layout[1], "max_new_tokens": NEW, "batch": 3, "ids": ids}
    return pool.run(TOKENS, layout[0], asked | more, deadline_s=120)[0]


@pytest.mark.parametrize(("family", "layout"), CELLS)
def test_greedy_tokens_are_those_of_transformers(family: str, layout: str, made: Any, pool: Pool) -> None:
    folder, theirs = made(family)
    for (tokens, finish), expected in zip(_ours(pool, folder, LAYOUTS[layout]), theirs, strict=True):
        ends = finish == "stop"  # transformers shows the token that ended it
        assert tokens == (expected[:-1] if ends else expected)
        assert ends or len(tokens) == NEW


def test_draws_are_the_same_on_every_layout(made: Any, pool: Pool) -> None:
    folder, greedy = made("llama")
    drawn = {"sampling": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 7}}
    first = _ours(pool, folder, ONE, **drawn)
    assert [t for t, _ in first] != greedy and first != _ours(pool, folder, ONE, sampling={"temperature": 0.8, "seed": 8})
    assert first == _ours(pool, folder, TP2_DP2, **drawn) == _ours(pool, folder, PP2, **drawn)


def test_a_window_hides_what_lies_before_it(pool: Pool, tmp_path: Path) -> None:
    """Mistral's sliding attention, with answers that go on beyond the window."""
    shape = models.draw(31, even=True) | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    model = models.like_llama("mistral", **shape)
    model.config.sliding_window = 6
    model = type(model)(model.config)
    torch.manual_seed(2)
    for p in model.parameters():
        p.data.normal_(0.0, 0.3)
    folder = models.saved(model.eval(), tmp_path / "hf")
    theirs = [_theirs(model, ids) for ids in prompts(model.config.vocab_size)]
    assert [t for t, _ in _ours(pool, folder, ONE)] == theirs


def test_an_answer_ends_with_the_context(made: Any, pool: Pool) -> None:
    folder, _ = made("gpt")
    found = _ours(pool, folder, ONE, max_new_tokens=100)
    assert {f for _, f in found} <= {"context", "stop"} and "context" in {f for _, f in found}
    assert all(len(ids) + len(t) == 32 for ids, (t, f) in zip(prompts(131), found, strict=True) if f == "context")
