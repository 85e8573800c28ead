"""Initial weights as a function of (seed, global name) alone, cut for this rank one parameter at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TIED_NAME = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Shard:
    """How a whole parameter is cut over tensor-parallel ranks.

    dim: the dimension that is cut, None where every rank holds the whole; blocks: equal parts
    stacked along dim that are cut each by itself (2 for [gate; up], else 1).
    """

    dim: int | None
    blocks: int = 1

    def whole(self, shape: torch.Size, tp: int) -> list[int]:
        """Shape of the whole parameter, from one rank's."""
        full = list(shape)
        if self.dim is not None:
            full[self.dim] *= tp
        return full

    def cut(self, full: Tensor, *, tp: int, rank: int) -> Tensor:
        """One rank's part of the whole parameter."""
        if self.dim is None or tp == 1:
            return full
        parts = [block.chunk(tp, self.dim)[rank] for block in full.chunk(self.blocks, self.dim)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


def shard_of(name: str, parameter: Tensor, *, gated: bool) -> Shard:
    """How megatron-core cut this parameter, read from its attributes."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return Shard(None)
    dim = int(getattr(parameter, "partition_dim", 0))
    return Shard(dim, 2 if gated and ".linear_fc1." in name else 1)


def known_shard(name: str, *, gated: bool) -> Shard:
    """The same from a global name alone, for who has no model: Megatron's column-parallel parts are cut by rows, row-parallel ones by columns."""
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return Shard(1)
    if name.startswith(("embedding.word_embeddings.", "output_layer.")) or (".linear_qkv." in name and "layer_norm" not in name):
        return Shard(0)
    if ".linear_fc1." in name and "layer_norm" not in name:
        return Shard(0, 2 if gated else 1)
    return Shard(None)


def global_name(chunk: torch.nn.Module, name: str, *, tied: bool) -> str:
    """A parameter's name with layers numbered over the whole model, whatever stage or chunk holds them."""
    if name.startswith("decoder.layers."):
        _, _, local, rest = name.split(".", 3)
        return f"decoder.layers.{chunk.decoder.layers[int(local)].layer_number - 1}.{rest}"
    if tied and name == "output_layer.weight":
        return TIED_NAME
    return name


def global_parameters(chunk: torch.nn.Module, *, tied: bool) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of a stage chunk under their global names."""
    for name, parameter in chunk.named_parameters():
        yield global_name(chunk, name, tied=tied), parameter


def draw(name: str, shape: list[int], *, seed: int, std: float, num_layers: int, device: torch.device) -> Tensor:
    """A whole parameter in fp32: norm weights 1, biases 0, matrices normal.

    Projections back into the residual stream have std / sqrt(2 * num_layers) (GPT-2, section 2.3).
    """
    if name.endswith(".bias"):
        return torch.zeros(shape, device=device)
    if "layernorm" in name:
        return torch.ones(shape, device=device)
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= (2 * num_layers) ** 0.5
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)


@torch.no_grad()
def materialise(
    chunk: torch.nn.Module,
    *,
    seed: int,
    std: float,
    num_layers: int,
    tied: bool,
    gated: bool,
    tp: int,
    tp_rank: int,
    dtype: torch.dtype,
    device: torch.device,
    partition: Callable[[torch.nn.Parameter], None] | None = None,
    blank: bool = False,
) -> None:
    """Give every parameter of a chunk built on the meta device its memory and its initial value, all in one dtype.

    megatron-core leaves learned positions in fp32; under ZeRO-3 DeepSpeed then takes all parameters for fp32.

    blank: zeros instead, for weights that are read from a checkpoint later.
    partition is called on each parameter as soon as it is filled, so that under ZeRO-3 no more
    than one whole parameter exists at a time.
    """
    for local, parameter in list(chunk.named_parameters()):
        name = global_name(chunk, local, tied=tied)
        shard = shard_of(name, parameter, gated=gated)
        if blank:
            value = torch.zeros(parameter.shape, dtype=dtype, device=device)
        else:
            full = draw(name, shard.whole(parameter.shape, tp), seed=seed, std=std, num_layers=num_layers, device=device)
            value = shard.cut(full, tp=tp, rank=tp_rank).to(dtype).clone(memory_format=torch.contiguous_format)
        if parameter.is_meta:  # a meta parameter cannot be given memory in place
            owner, _, leaf = local.rpartition(".")
            real = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
            real.__dict__.update(parameter.__dict__)
            setattr(chunk.get_submodule(owner), leaf, real)
            parameter = real
        else:
            parameter.data = value
        if partition is not None:
            partition(parameter)
