"""What tells one family of models from another, as data: the layers it has, its published shapes,
other libraries' names for it.

A new family is one file in toolkit/arch/families, and one line in its __init__.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from toolkit.arch.spec import WeightSpec


@dataclass(frozen=True)
class Key:
    """A setting that another library's config and our model section both have.

    theirs, ours: its names there and here; several of theirs must agree, several of ours are all
    set. default: what theirs means where it is left out, or a function of their config. kind: its
    type. choices: their values and ours for each.
    null: whether null is a value of its own.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    default: Any = None
    kind: type = int
    choices: Mapping[str, str] = field(default_factory=dict)
    null: bool = False


@dataclass(frozen=True)
class Fixed:
    """A setting of theirs of which models here compute only some values: the first is assumed and
    written. why: else refused.
    """

    theirs: str
    allowed: tuple[Any, ...]
    why: str
    written: bool = True


@dataclass(frozen=True)
class Part:
    """A tensor of another library: its name, its shape as stored, and whether that is transposed
    against torch.nn.Linear's.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Format:
    """How another library keeps the models of a family.

    architecture, model_type: its names in config.json ("" where there is none). inner: what the
    names start with in a file
    of the whole model. names: of each of our modules, one, or one for each of its parts; {i} is the
    layer. transposed: linear weights are stored as [in, out]. biased: it always has all biases.
    says: keys of our section that hold for every
    model of this format. constants: keys of config.json that say nothing about the model.
    """

    name: str
    title: str
    inner: str
    names: Mapping[str, str | tuple[str, ...]]
    keys: tuple[Key, ...]
    architecture: str = ""
    model_type: str = ""
    fixed: tuple[Fixed, ...] = ()
    transposed: bool = False
    biased: bool = False
    says: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)

    def parts(self, weight: WeightSpec) -> tuple[Part, ...]:
        """The tensors here that make up a weight of ours."""
        names = self.names[weight.module]
        kind = weight.name.rpartition(".")[2]
        shapes = weight.parts
        if isinstance(names, str):
            names = (names,)
            if len(shapes) > 1:  # one tensor here for all parts, one above the other
                shapes = ((sum(s[0] for s in shapes), *shapes[0][1:]),)
        transposed = self.transposed and weight.group == "matrix"
        return tuple(
            Part(f"{name.replace('{i}', str(weight.number))}.{kind}", shape[::-1] if transposed else shape, transposed)
            for name, shape in zip(names, shapes, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models. title: in a few words. activations: of its MLP, the usual one first;
    swiglu is gated.

    ffn: the usual inner width for a hidden size. qkv_bias, attention_bias, mlp_bias, norm_bias,
    qk_layernorm: what a model has unless its config says otherwise. formats: other libraries' ways
    of keeping it, the one to export to first. presets: published shapes as keys of the model
    section.
    """

    name: str
    title: str
    norm: Literal["rms", "layer"]
    positions: Literal["rotary", "learned"]
    activations: tuple[str, ...]
    ffn: Callable[[int], int]
    formats: tuple[Format, ...]
    presets: Mapping[str, Mapping[str, Any]]
    qkv_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    qk_layernorm: bool = False
