"""What a model is: every weight once, and what follows from it. Counts, cuts, names and FLOPs come
from here; no torch.

spec = config.model.spec
for weight in spec.weights():
    print(weight.name, weight.shape, weight.cut, weight.group)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

Place = Literal["first", "layer", "last"]
Group = Literal["matrix", "vector", "embedding"]
Initial = Literal["normal", "residual", "one", "zero"]
Join = Literal["same", "padded", "stacked", "grouped"]

LAYER = "decoder.layers.{i}."
TIED_NAME = "embedding.word_embeddings.weight"
_IN_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


_HASHES = hash(__name__)  # text hashes differently in each process, and a pickled value takes what it has kept with it


def hash_once(value: Any) -> int:
    """The hash of a frozen dataclass's fields, computed once and kept with it: for what caches look
    up very often.
    """
    known: tuple[int, int] | None = value.__dict__.get("_hash")
    if known is None or known[0] != _HASHES:
        known = value.__dict__["_hash"] = _HASHES, hash(tuple(getattr(value, name) for name in value.__dataclass_fields__))
    return known[1]


@dataclass(frozen=True)
class Cut:
    """How tensor-parallel ranks share a weight: along `dim`, or not at all (None: every rank holds
    the whole).

    blocks: equal parts stacked along dim that are cut each by itself (2 for [gate; up], else 1).
    """

    dim: int | None = None
    blocks: int = 1

    def part(self, whole: tuple[int, ...] | list[int], tp: int) -> list[int]:
        """Shape of each rank's part."""
        return [n // tp if i == self.dim else n for i, n in enumerate(whole)]

    def whole(self, part: tuple[int, ...] | list[int], tp: int) -> list[int]:
        """Shape of the whole weight, from one rank's part."""
        return [n * tp if i == self.dim else n for i, n in enumerate(part)]


ROWS, COLUMNS, WHOLE = Cut(0), Cut(1), Cut()


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """One weight, whole.

    name: global, with layers numbered over the whole model ({i} in a layer's template).
    module_name: the name its module gives it, which differs where Transformer Engine fuses a norm
    into the linear layer behind it. shape: rows and columns as in torch.nn.Linear, the vocabulary's
    padding included. place: on the first stage, in each layer, or on the last stage; a tied
    embedding is on both ends. group: what optimizers tell apart. initial: "residual" is normal with
    the smaller deviation of projections back into the residual stream (GPT-2, section 2.3).
    per_head: a norm of each head, of which every tensor-parallel rank sees its own heads alone.
    number: of its layer. parts, join: the tensors other formats keep it as and
    how they make it up: one, one with rows that pad the vocabulary, one above the other, or per query group
    [query heads, key, value].
    """

    name: str
    module_name: str
    shape: tuple[int, ...]
    place: Place
    group: Group
    initial: Initial
    cut: Cut = WHOLE
    per_head: bool = False
    number: int | None = None
    parts: tuple[tuple[int, ...], ...] = ()
    join: Join = "same"

    @cached_property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """The name without its layer and without .weight or .bias: what tables of other formats go by."""
        prefix = LAYER if self.number is None else LAYER.replace("{i}", str(self.number))
        return self.name.removeprefix(prefix).rpartition(".")[0]

    def count_on(self, tp: int) -> int:
        """Elements of one tensor-parallel rank."""
        return self.count if self.cut.dim is None else self.count // tp

    def in_layer(self, i: int) -> WeightSpec:
        """This template's weight of layer i, counted from 0 over the whole model."""
        name, module_name = (text.replace("{i}", str(i)) for text in (self.name, self.module_name))
        return replace(self, name=name, module_name=module_name, number=i)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer.

    vocab: token ids; rows: of the embedding, padding included. positions: rows of a learned
    position table (0: rotary).
    qkv_bias, proj_bias, mlp_bias, norm_bias: which linear layers and norms have biases. qk_norm:
    queries and keys are
    normalised per head. fused_norms: Transformer Engine's layers, which keep a norm's weights in
    the linear layer behind it.
    """

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    rows: int
    positions: int = 0
    norm: Literal["rms", "layer"] = "rms"
    gated: bool = True
    tied: bool = False
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    dropout: bool = False
    fused_norms: bool = False

    __hash__ = hash_once

    @property
    def rotary(self) -> bool:
        """Whether positions enter by rotating queries and keys."""
        return self.positions == 0

    @cached_property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @cached_property
    def key_value(self) -> int:
        """Width of all key heads and all value heads together."""
        return 2 * self.groups * self.head_dim

    # -- weights ------------------------------------------------------------------------------------

    @cached_property
    def before(self) -> tuple[WeightSpec, ...]:
        """What the first stage holds before its layers."""
        table = WeightSpec(
            name=TIED_NAME,
            module_name=TIED_NAME,
            shape=(self.rows, self.hidden),
            place="first",
            group="embedding",
            initial="normal",
            cut=ROWS,
            parts=((self.vocab, self.hidden),),
            join="padded",
        )
        if not self.positions:
            return (table,)
        name = "embedding.position_embeddings.weight"
        return table, replace(
            table,
            name=name,
            module_name=name,
            shape=(self.positions, self.hidden),
            cut=WHOLE,
            parts=((self.positions, self.hidden),),
            join="same",
        )

    @cached_property
    def layer(self) -> tuple[WeightSpec, ...]:
        """The weights of one layer as templates, in the order of megatron-core's modules."""
        h, key = self.hidden, self.key_value // 2
        attention, mlp = LAYER + "self_attention.", LAYER + "mlp."
        fused = self.fused_norms
        input_norm = self._norm(LAYER + "input_layernorm", attention + "linear_qkv.layer_norm_" if fused else "", h)
        mlp_norm = self._norm(LAYER + "pre_mlp_layernorm", mlp + "linear_fc1.layer_norm_" if fused else "", h)
        proj = _linear(attention + "linear_proj", h, self.query, bias=self.proj_bias, cut=COLUMNS, initial="residual")
        qkv = _linear(attention + "linear_qkv", (self.query, key, key), h, bias=self.qkv_bias, cut=ROWS, join="grouped")
        heads = (
            tuple(
                replace(w, per_head=True)
                for name in ("q_layernorm", "k_layernorm")
                for w in self._norm(attention + name, "", self.head_dim)
            )
            if self.qk_norm
            else ()
        )
        fc1 = _linear(
            mlp + "linear_fc1",
            (self.ffn, self.ffn) if self.gated else self.ffn,
            h,
            bias=self.mlp_bias,
            cut=Cut(0, 2 if self.gated else 1),
            join="stacked" if self.gated else "same",
        )
        fc2 = _linear(mlp + "linear_fc2", h, self.ffn, bias=self.mlp_bias, cut=COLUMNS, initial="residual")
        start = proj + input_norm + qkv if fused else input_norm + proj + qkv
        return start + heads + mlp_norm + fc1 + fc2

    @cached_property
    def after(self) -> tuple[WeightSpec, ...]:
        """What the last stage holds after its layers; a tied output layer is the embedding, and not
        listed again.
        """
        norm = tuple(replace(w, place="last") for w in self._norm("decoder.final_layernorm", "", self.hidden))
        if self.tied:
            return norm
        name = "output_layer.weight"
        return *norm, replace(self.before[0], name=name, module_name=name, place="last")

    def weights(self) -> Iterator[WeightSpec]:
        """Every weight of the model once, in model order."""
        yield from self.before
        for i in range(self.layers):
            yield from (w.in_layer(i) for w in self.layer)
        yield from self.after

    def weight(self, name: str) -> WeightSpec:
        """The weight of a global name, or of its module's; KeyError where the model has none."""
        found = _IN_LAYER.fullmatch(name)
        if found is None:
            return self._by_name[name]
        if int(found[1]) >= self.layers:
            raise KeyError(name)
        return self._by_name[LAYER + found[2]].in_layer(int(found[1]))

    def has(self, name: str) -> bool:
        """Whether the model has a weight of this global name."""
        try:
            return bool(self.weight(name))
        except KeyError:
            return False

    @cached_property
    def _by_name(self) -> dict[str, WeightSpec]:
        every = (*self.before, *self.layer, *self.after)
        return {w.module_name: w for w in every} | {w.name: w for w in every}

    def with_all_biases(self) -> ModelSpec:
        """The same model with every bias there can be, for formats that always have them (as zeros)."""
        return replace(self, qkv_bias=True, proj_bias=True, mlp_bias=True, norm_bias=self.norm == "layer")

    def _norm(self, name: str, fused_into: str, width: int) -> tuple[WeightSpec, ...]:
        """A norm's scale, and its bias where it has one; fused_into: what its module names start
        with, "" for its own.
        """
        kinds: list[tuple[str, Initial]] = [("weight", "one"), ("bias", "zero")]
        return tuple(
            WeightSpec(
                name=f"{name}.{kind}",
                module_name=f"{fused_into}{kind}" if fused_into else f"{name}.{kind}",
                shape=(width,),
                place="layer",
                group="vector",
                initial=initial,
                parts=((width,),),
            )
            for kind, initial in kinds[: 1 + self.norm_bias]
        )

    # -- what follows from the weights ----------------------------------------------------------------

    @cached_property
    def layer_parameters(self) -> int:
        """Weights of one layer."""
        return sum(w.count for w in self.layer)

    @cached_property
    def embedding_parameters(self) -> int:
        """Weights before the layers."""
        return sum(w.count for w in self.before)

    @cached_property
    def head_parameters(self) -> int:
        """Weights after the layers, the output matrix only where it is not the embedding's."""
        return sum(w.count for w in self.after)

    @property
    def parameters(self) -> int:
        """All weights, a tied matrix once, with the rows that pad the vocabulary."""
        return self.layers * self.layer_parameters + self.embedding_parameters + self.head_parameters

    @property
    def unpadded_parameters(self) -> int:
        """All weights without the rows that pad the vocabulary: the number people publish."""
        return replace(self, rows=self.vocab).parameters

    def largest_weights(self) -> tuple[int, int]:
        """Elements of the largest weight that tensor-parallel ranks share out, and of the largest
        that each holds whole.
        """
        every = (*self.before, *self.layer, *self.after)
        shared = max(w.count for w in every if w.cut.dim is not None)
        return shared, max(w.count for w in every if w.cut.dim is None)

    def flops_per_token(self, seq_length: int) -> float:
        """FLOPs of forward and backward per token, without recompute, every matrix multiply at 2mnk.

        Attention scores count all s × s pairs (PaLM, arXiv 2204.02311, appendix B), so that figures
        compare with what others publish; the backward costs twice the forward.
        """
        matrices = sum(w.count for w in self.layer if w.group == "matrix")
        layer = 2 * matrices + 4 * seq_length * self.query
        return 3.0 * (self.layers * layer + 2 * self.hidden * self.rows)


def _linear(
    name: str,
    rows: int | tuple[int, ...],
    columns: int,
    *,
    bias: bool,
    cut: Cut,
    join: Join = "same",
    initial: Initial = "normal",
) -> tuple[WeightSpec, ...]:
    """Weight of a linear layer, and its bias where it has one; rows: of each of its parts.

    A bias of a layer whose columns are cut is added after the sum over tensor-parallel ranks, so
    all of them hold it whole.
    """
    each = (rows,) if isinstance(rows, int) else rows
    weight = WeightSpec(
        name=f"{name}.weight",
        module_name=f"{name}.weight",
        shape=(sum(each), columns),
        place="layer",
        group="matrix",
        initial=initial,
        cut=cut,
        parts=tuple((r, columns) for r in each),
        join=join,
    )
    if not bias:
        return (weight,)
    return weight, replace(
        weight,
        name=f"{name}.bias",
        module_name=f"{name}.bias",
        shape=(sum(each),),
        group="vector",
        initial="zero",
        cut=WHOLE if cut.dim == 1 else cut,
        parts=tuple((r,) for r in each),
    )
