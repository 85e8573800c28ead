"""Every optimizer of the registry against torch's own, on the whole model in one process; and
optimizers that a program plugs in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.parity.cells import CUT_MATRICES, MUON, Cell
from tests.pool import Pool
from tests.rank import Rank
from toolkit.arch.optimizers import OPTIMIZERS
from toolkit.arch.spec import ModelSpec, WeightSpec
from toolkit.config.load import parse_config
from toolkit.engine.muon import joined, separate
from toolkit.errors import ConfigError, LayoutError, ToolkitError

STEPS = 6
ADAM = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
TORCH: dict[str, dict[str, Any]] = {  # of the config's defaults
    "adamw": ADAM,
    "adam": ADAM,
    "sgd": {"lr": 1e-3, "momentum": 0.9},
    "muon": {"lr": 1e-3, "momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"},
}
KEYS = {"optimizer.lr": 1e-3, "model.qk_layernorm": True, "model.attention_bias": True}


# -- against torch ----------------------------------------------------------------------------------------


def rows(weight: WeightSpec, spec: ModelSpec) -> list[torch.Tensor]:
    """Which rows of a weight are its queries, keys and values, or gate and up: counted row by row."""
    every = range(weight.shape[0])
    if weight.join == "stacked":
        return [torch.tensor([r for r in every if r // spec.ffn == i]) for i in range(2)]
    if weight.join != "grouped":
        return [torch.tensor(list(every))]
    d, heads = spec.head_dim, spec.heads // spec.groups
    head = [r // d % (heads + 2) for r in every]  # of its query group: queries, then key, then value
    return [torch.tensor([r for r in every if min(max(head[r] - heads + 1, 0), 2) == i]) for i in range(3)]


class Plain:
    """torch.optim on the parameters as they are, and on the matrices that Muon takes for such."""

    def __init__(self, chunk: Any, config: Any) -> None:
        from toolkit.model.init import named_weights

        spec, o = config.model.spec, config.optimizer
        self.matrices: list[tuple[torch.nn.Parameter, torch.Tensor, torch.nn.Parameter]] = []
        decayed, plain = [], []
        for weight, p in named_weights(chunk, spec):
            if o.name == "muon" and weight.group == "matrix":
                self.matrices += [(p, r, torch.nn.Parameter(p.detach()[r].clone())) for r in rows(weight, spec)]
            else:
                (decayed if p.dim() > 1 else plain).append(p)
        groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "muon": torch.optim.AdamW}
        self.optimizers = [kinds[o.name](groups, **TORCH["adamw" if o.name == "muon" else o.name])]
        if self.matrices:
            self.optimizers += [torch.optim.Muon([m for _, _, m in self.matrices], weight_decay=o.weight_decay, **TORCH["muon"])]

    def step(self) -> None:
        for p, r, matrix in self.matrices:
            matrix.grad = p.grad[r]  # type: ignore[index]
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            for p, r, matrix in self.matrices:
                p[r] = matrix


def both(raw: dict[str, Any]) -> dict[str, Any]:
    """Losses of our engine and of a plain loop, the largest difference of any weight, and how far
    the weight that moved least and the one that moved most came, in a worker.
    """
    from toolkit.model.build import build_chunks

    rank = Rank(raw)
    config, engine = rank.config, rank.engine
    (chunk,) = build_chunks(config, rank.layout, device=torch.device("cpu"), partition=None)
    plain, before = Plain(chunk, config), [p.detach().clone() for p in chunk.parameters()]
    losses: list[list[float]] = [[], []]
    for step in range(STEPS):
        losses[0].append(rank.step(step)[0])
        total, micro = 0.0, rank.micro(step)
        for batch in micro:
            positions = torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"])
            loss = chunk(batch["tokens"], positions, None, labels=batch["labels"]).float().mean() / len(micro)
            loss.backward()
            total += float(loss)
        losses[1].append(total)
        torch.nn.utils.clip_grad_norm_(chunk.parameters(), config.train.grad_clip)
        plain.step()
        chunk.zero_grad()

    def farthest(weights: Any) -> list[float]:
        return [float((a - b).abs().max()) for a, b in zip(engine.chunks[0].parameters(), weights, strict=True)]

    return {"losses": losses, "apart": max(farthest(chunk.parameters())), "moved": farthest(before)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_as_torch(name: str, pool: Pool) -> None:
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    found = pool.run("tests.engine.test_optimizers:both", 1, Cell(1, KEYS | {"optimizer.name": name}).raw(), deadline_s=120)[0]
    ours, theirs = found["losses"]
    assert ours == pytest.approx(theirs, rel=1e-6)
    # gradients summed in another order differ in fp32's last digit, which bf16 sometimes rounds to
    # another neighbour
    assert found["apart"] < (0.05 if name == "muon" else 1e-3) * max(found["moved"]), found
    assert min(found["moved"]) > 0


def test_matrices_are_the_parts_that_other_formats_keep() -> None:
    spec = parse_config(Cell(1, {}).raw()).model.spec
    for weight in spec.layer:
        if weight.group == "matrix":
            whole = torch.randn(weight.shape)
            matrices = separate(weight, whole, spec)
            assert [tuple(m.shape) for m in matrices] == list(weight.parts)
            assert all(torch.equal(m, whole[r]) for m, r in zip(matrices, rows(weight, spec), strict=True))
            assert torch.equal(joined(weight, matrices, spec), whole)


def same_gradients(raw: dict[str, Any]) -> tuple[float, float]:
    """Our Muon and torch's on the same random gradients: how far they end apart, and how far they
    came, in a worker.
    """
    rank = Rank(raw)
    config, engine = rank.config, rank.engine
    muon = engine.optimizer.optimizer.members["muon"]
    (group,) = [g for g in engine.optimizer.param_groups if g["rule"] == "muon"]
    (flat,), spec = group["params"], config.model.spec
    pieces = [(p, r) for p in group["parts"] for r in rows(p.weight, spec)]

    def cut(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor[p.first : p.first + p.numel].view(p.shape)[r].clone() for p, r in pieces]

    before = flat.detach().clone()
    theirs = [torch.nn.Parameter(m) for m in cut(before)]
    torchs = torch.optim.Muon(theirs, weight_decay=group["weight_decay"], **TORCH["muon"])
    muon.param_groups = [group]
    for _ in range(3):
        flat.grad = torch.randn_like(flat)
        for matrix, gradient in zip(theirs, cut(flat.grad), strict=True):
            matrix.grad = gradient
        muon.step()
        torchs.step()
    apart = max(float((a - b).abs().max()) for a, b in zip(cut(flat.detach()), theirs, strict=True))
    return apart, float((flat.detach() - before).abs().max())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_on_the_same_gradients(pool: Pool) -> None:
    cell = Cell(1, KEYS | MUON)
    apart, moved = pool.run("tests.engine.test_optimizers:same_gradients", 1, cell.raw(), deadline_s=120)[0]
    assert apart < 1e-6 and moved > 1e-3


def updates(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    """How one step moved each matrix's part on this rank, in a worker."""
    from toolkit.model.init import named_weights

    rank = Rank(raw)
    before = [p.detach().clone() for p in rank.chunks[0].parameters()]
    rank.step(0)
    named = zip(named_weights(rank.chunks[0], rank.config.model.spec), before, strict=True)
    return {weight.name: (p.detach() - old) / rank.config.optimizer.lr for (weight, p), old in named if weight.group == "matrix"}


def test_muons_updates_are_orthogonal_whatever_cuts_the_matrix(pool: Pool) -> None:
    """An update of AdamW, or of a part of the matrix, has other singular values."""
    keys = MUON | CUT_MATRICES | {"parallel.tp": 2, "optimizer.weight_decay": 0.0, "optimizer.lr": 0.01}
    cell = Cell(4, keys)
    ranks = pool.run("tests.engine.test_optimizers:updates", 4, cell.raw(), deadline_s=120)
    from toolkit.model.init import put_together

    spec = parse_config(cell.raw()).model.spec
    for name in ranks[0]:
        weight = spec.weight(name)
        for matrix in separate(weight, put_together(weight.cut, [ranks[0][name], ranks[1][name]]), spec):
            values = torch.linalg.svdvals(matrix) / (0.2 * max(matrix.shape) ** 0.5)
            assert 0.6 < values.median() < 1.3 and values.max() < 1.3, (name, values)


# -- plugged in -------------------------------------------------------------------------------------------


def torch_adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **ADAM)


class SignOfRows(torch.optim.Optimizer):
    """Looks at whole matrices: every row moves by the sign of its sum."""

    needs = "whole weights"

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (flat,) = group["params"]
            for part in group["parts"]:
                here = slice(part.first, part.first + part.numel)
                by_row = flat.grad[here].view(part.shape[0], -1).sum(1, keepdim=True).sign()
                flat[here].view(part.shape[0], -1).sub_(by_row, alpha=group["lr"])


class NoOptimizer:
    def __init__(self, groups: list[dict[str, Any]]) -> None:
        pass


def train_with(argument: tuple[str, dict[str, Any]]) -> list[float] | str:
    """Losses of a few steps with an optimizer of this module, or the user error, in a worker."""
    name, raw = argument
    try:
        rank = Rank(raw, optimizer=globals()[name] if name else None)
    except ToolkitError as error:
        return f"{type(error).__name__}: {error}"
    losses = [rank.step(number)[0] for number in range(STEPS)]
    if name == "SignOfRows":
        moved = [part.weight.name for group in rank.engine.optimizer.param_groups for part in group["parts"]]
        assert sorted(moved) == sorted(weight.name for weight in rank.config.model.spec.weights())
    return losses


def losses_with(pool: Pool, name: str, world: int, keys: dict[str, Any]) -> Any:
    return pool.run("tests.engine.test_optimizers:train_with", world, (name, Cell(world, KEYS | keys).raw()), deadline_s=120)[0]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_plugged_in_optimizer_trains_in_every_stage(stage: int, pool: Pool) -> None:
    keys = {"zero.stage": stage}
    assert losses_with(pool, "torch_adamw", 2, keys) == pytest.approx(losses_with(pool, "", 2, keys), rel=1e-6)


def test_one_that_looks_at_whole_weights_gets_them_or_a_message(pool: Pool) -> None:
    losses, others = (losses_with(pool, name, 1, {"zero.stage": 0}) for name in ("SignOfRows", ""))
    assert losses[0] == others[0] and losses[-1] != others[-1]
    for world, keys in ((2, {"zero.stage": 1}), (2, {"zero.stage": 0, "parallel.tp": 2})):
        message = losses_with(pool, "SignOfRows", world, keys)
        assert message.startswith("LayoutError") and "SignOfRows needs whole weights" in message and "Set zero.stage=0" in message


def test_what_cannot_be_plugged_in_is_named(pool: Pool) -> None:
    assert "NoOptimizer returned" in losses_with(pool, "NoOptimizer", 1, {})
    offloaded = losses_with(pool, "torch_adamw", 1, {"zero.stage": 1, "zero.offload_optimizer": "cpu"})
    assert offloaded.startswith(LayoutError.__name__) and "torch_adamw with zero.offload_optimizer=cpu" in offloaded


# -- the config -------------------------------------------------------------------------------------------


def refusals() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"name": "lion"}, "Set optimizer.name to adamw, adam, sgd or muon"
    yield {"name": "adamw", "momentum": 0.9}, "momentum=0.9 with name=adamw, which has none"
    yield {"name": "sgd", "momentum": 0.0, "nesterov": True}, "nesterov=true with momentum=0"


@pytest.mark.parametrize(("section", "text"), refusals())
def test_a_wrong_optimizer_is_refused_in_one_message(section: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_config(Cell(1, {}).raw() | {"optimizer": section})


def test_what_is_kept_follows_from_the_config() -> None:
    def states(**keys: Any) -> list[tuple[str, ...]]:
        return [g.rule.states for g in parse_config(Cell(1, {}).raw() | {"optimizer": keys}).optimizer.spec.groups]

    assert states(name="sgd") == 3 * [("momentum_buffer",)] and states(name="sgd", momentum=0.0) == 3 * [()]
    assert states(name="muon") == [("momentum_buffer",), *3 * [("exp_avg", "exp_avg_sq")]]
    assert parse_config(Cell(1, {}).raw() | {"optimizer": {"name": "muon"}}).optimizer.spec.momentum == 0.95
