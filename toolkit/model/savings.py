"""What a model that generates may be made smaller by: weights of 8 or 4 bits (torchao), weights
that are 0, keys and values of 8 bits.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from toolkit.errors import ConfigError, MachineError
from toolkit.parallel.generation import int4_group

Bits = Literal["none", "int8", "int4"]
LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
TABLES = ("word_embeddings", "output_layer")


@dataclass(frozen=True, kw_only=True)
class Savings:
    """weights: int8, or int4 with embeddings in int8. kv: keys and values in int8, or in the CPU's
    memory. grow: a cache that takes
    memory as it fills. prune: the share of each layer's weights that become 0, the smallest first,
    or "2:4", two of every four in a row.
    offload: where layers are that are not being computed.
    """

    weights: Bits = "none"
    kv: Literal["none", "int8", "cpu"] = "none"
    grow: bool = False
    prune: str = "none"
    offload: Literal["none", "cpu", "disk", "zero", "zero-cpu", "zero-nvme"] = "none"

    @property
    def name(self) -> str:
        """What it is called in tables."""
        parts = [
            f"weights {self.weights}" if self.weights != "none" else "",
            {"none": "", "int8": "KV int8", "cpu": "KV on the CPU"}[self.kv],
            "KV growing" if self.grow else "",
            f"pruned {self.prune}" if self.prune != "none" else "",
            {"none": "", "cpu": "layers from the CPU", "disk": "layers from disk"}[self.offload],
        ]
        return ", ".join(p for p in parts if p) or "plain"


NO_SAVINGS = Savings()


def share_of(prune: str) -> float | None:
    """The share that --prune names, None for 2:4; ConfigError for anything else."""
    if prune == "2:4":
        return None
    try:
        share = float(prune)
    except ValueError:
        share = -1.0
    if not 0.0 < share < 1.0:
        raise ConfigError(f"--prune {prune}", why="it is neither 2:4 nor a share of the weights", fix="Set it to 2:4, or between 0 and 1.")
    return share


@torch.no_grad()
def apply_savings(model: torch.nn.Module, savings: Savings) -> None:
    """Change a stage chunk in place. Pruning comes first: what is quantised is what is left."""
    linears = [m for name, m in model.named_modules() if name.endswith(LINEARS)]
    if savings.prune != "none":
        share = share_of(savings.prune)
        for module in linears:
            weight: Any = module.weight
            mask = two_of_four(weight) if share is None else largest(weight, keep=1.0 - share)
            weight.mul_(mask)
            check_mask(weight, mask)
    if savings.weights != "none":
        _quantise(model, linears, savings.weights)


def largest(weight: Tensor, *, keep: float) -> Tensor:
    """Where the largest share of a weight's elements is, by magnitude."""
    count = max(1, round(weight.numel() * keep))
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.abs().flatten().topk(count).indices] = True
    return mask.view(weight.shape)


def two_of_four(weight: Tensor) -> Tensor:
    """Where the two largest of every four elements in a row are, whose columns are a multiple of 4:
    what sparse tensor cores take.
    """
    fours = weight.abs().view(-1, 4)
    mask = torch.zeros_like(fours, dtype=torch.bool)
    mask.scatter_(1, fours.topk(2, dim=1).indices, True)
    return mask.view(weight.shape)


def check_mask(weight: Tensor, mask: Tensor) -> None:
    """Every element outside the mask is 0."""
    if bool((weight[~mask] != 0).any()):
        raise RuntimeError("a pruned weight is not 0")


def _quantise(model: torch.nn.Module, linears: list[torch.nn.Module], bits: Bits) -> None:
    if importlib.util.find_spec("torchao") is None:
        raise MachineError(
            f"--weights {bits}",
            why="the package torchao, which quantises, is not installed",
            fix="Install torchao>=0.18 (the extra `quant`).",
        )
    logger = logging.getLogger("torchao")
    logger.setLevel(logging.ERROR)  # it lists CUDA libraries that are not there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        eight: Any = Int8WeightOnlyConfig()
        four: Any = None
        if bits == "int4":
            four = _four(linears)
        for name, module in model.named_modules():
            if name.endswith(LINEARS) or (name.endswith(TABLES) and getattr(module, "weight", None) is not None):
                config = four if four is not None and name.endswith(LINEARS) else eight
                quantize_(module, config, filter_fn=lambda _module, path: path == "")


def _four(linears: list[torch.nn.Module]) -> Any:
    """torchao's int4 configuration for this device, with the widest groups that fit all weights."""
    weights: list[Any] = [m.weight for m in linears]
    group = int4_group(tuple(w.shape[-1] for w in weights))
    assert group is not None, "the rules refuse it"
    if weights[0].device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

        return PrototypeInt4WeightOnlyConfig(
            group_size=group, int4_choose_qparams_algorithm=Int4ChooseQParamsAlgorithm.HQQ, set_inductor_config=False
        )
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=group)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights as they are stored, a shared one once; those without memory are left out."""
    return sum(_bytes(p) for p in {id(p): p for p in model.parameters()}.values() if p.device.type != "meta")


def _bytes(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return int(tensor.nbytes)
