"""Initial weights as a function of (seed, global name) alone, cut for this rank one parameter at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.arch.spec import TIED_NAME, Cut, ModelSpec, WeightSpec


def cut_out(cut: Cut, whole: Tensor, *, tp: int, rank: int) -> Tensor:
    """One tensor-parallel rank's part of a whole weight."""
    if cut.dim is None or tp == 1:
        return whole
    parts = [block.chunk(tp, cut.dim)[rank] for block in whole.chunk(cut.blocks, cut.dim)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, cut.dim)


def put_together(cut: Cut, parts: Sequence[Tensor]) -> Tensor:
    """The whole weight from all tensor-parallel ranks' parts: the inverse of cut_out()."""
    if cut.dim is None or len(parts) == 1:
        return parts[0]
    blocks = zip(*(part.chunk(cut.blocks, cut.dim) for part in parts), strict=True)
    return torch.cat([piece for block in blocks for piece in block], cut.dim)


def global_name(chunk: Any, name: str, spec: ModelSpec) -> str:
    """A parameter's name with layers numbered over the whole model, whatever stage or chunk holds them."""
    if name.startswith("decoder.layers."):
        _, _, local, rest = name.split(".", 3)
        name = f"decoder.layers.{chunk.decoder.layers[int(local)].layer_number - 1}.{rest}"
    if spec.tied and name == "output_layer.weight":
        return TIED_NAME
    return spec.weight(name).name


def named_weights(chunk: torch.nn.Module, spec: ModelSpec) -> Iterator[tuple[WeightSpec, torch.nn.Parameter]]:
    """Parameters of a stage chunk and what each of them is."""
    for name, parameter in chunk.named_parameters():
        yield spec.weight(global_name(chunk, name, spec)), parameter


def draw(weight: WeightSpec, *, seed: int, std: float, num_layers: int, device: torch.device) -> Tensor:
    """A whole weight in fp32: norms 1, biases 0, matrices normal.

    Projections back into the residual stream have std / sqrt(2 * num_layers) (GPT-2, section 2.3).
    """
    if weight.initial == "zero":
        return torch.zeros(weight.shape, device=device)
    if weight.initial == "one":
        return torch.ones(weight.shape, device=device)
    if weight.initial == "residual":
        std /= (2 * num_layers) ** 0.5
    digest = hashlib.sha256(f"{seed}:{weight.name}".encode()).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(weight.shape, device=device).normal_(0.0, std, generator=generator)


@torch.no_grad()
def materialise(
    chunk: torch.nn.Module,
    spec: ModelSpec,
    *,
    seed: int,
    std: float,
    tp: int,
    tp_rank: int,
    dtype: torch.dtype,
    device: torch.device,
    partition: Callable[[torch.nn.Parameter], None] | None = None,
    blank: bool = False,
    read: Callable[[WeightSpec], Tensor] | None = None,
    leave: Callable[[WeightSpec], bool] | None = None,
) -> None:
    """Give every parameter of a chunk built on the meta device its memory and its initial value,
    all in one dtype.

    megatron-core leaves learned positions in fp32; under ZeRO-3 DeepSpeed then takes all parameters for fp32.

    blank: zeros instead, for weights that are read from a checkpoint later. read: its answer
    instead, this rank's part of a weight in
    memory of its own. leave: which weights stay on the meta device, for who reads them when they are needed.
    partition is called on each parameter as soon as it is filled, so that under ZeRO-3 no more
    than one whole parameter exists at a time.
    """
    for local, parameter in list(chunk.named_parameters()):
        if leave is not None and leave(spec.weight(global_name(chunk, local, spec))):
            continue
        if blank:
            value = torch.zeros(parameter.shape, dtype=dtype, device=device)
        elif read is not None:
            value = read(spec.weight(global_name(chunk, local, spec))).to(device=device, dtype=dtype)
        else:
            weight = spec.weight(global_name(chunk, local, spec))
            whole = draw(weight, seed=seed, std=std, num_layers=spec.layers, device=device)
            value = cut_out(weight.cut, whole, tp=tp, rank=tp_rank).to(dtype).clone(memory_format=torch.contiguous_format)
        if parameter.device.type == "meta":  # a meta parameter cannot be given memory in place
            owner, _, leaf = local.rpartition(".")
            real = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
            # what is there already is the new tensor's own: a rehearsal's tensors keep their device there
            real.__dict__.update({k: v for k, v in parameter.__dict__.items() if k not in real.__dict__})
            setattr(chunk.get_submodule(owner), leaf, real)
            parameter = real
        else:
            parameter.data = value
        if partition is not None:
            partition(parameter)
