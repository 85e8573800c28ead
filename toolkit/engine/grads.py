"""Gradients that several ranks hold a part of: summed over TP and tied copies, counted once in the norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.model.layers import SHARED_OUT, SUM_OVER_TP, TIED_COPY


def partial_over_tp(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Parameters whose gradient is the sum of what the tensor-parallel ranks hold."""
    return [p for p in parameters if getattr(p, SUM_OVER_TP, False)]


def sum_over_tp(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum small gradients over the tensor-parallel group in place, as one message per dtype."""
    for dtype in {g.dtype for g in gradients}:
        same = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.reshape(-1) for g in same])
        dist.all_reduce(flat, group=group)
        torch._foreach_copy_([g.view(-1) for g in same], list(flat.split([g.numel() for g in same])))


def hook_sum_over_tp(parameters: Iterable[torch.nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum at every backward, before ZeRO-2/3 reduces and frees the gradient (they leave no later moment)."""

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may still own the original
        dist.all_reduce(gradient, group=group)
        return gradient

    for parameter in parameters:
        parameter.register_hook(summed)


def sum_tied(gradient: Tensor, group: dist.ProcessGroup) -> None:
    """Sum the two stages' gradients of a tied embedding in place, wherever the buffer lives."""
    on_gpu = dist.get_backend(group) == "nccl" and gradient.device.type == "cpu"
    buffer = gradient.cuda() if on_gpu else gradient
    dist.all_reduce(buffer, group=group)
    if on_gpu:
        gradient.copy_(buffer)


def counts_in_norm(parameter: Tensor, *, tp_rank: int) -> bool:
    """Whether this rank's gradient of a parameter enters the global norm: each value once, on one rank."""
    if getattr(parameter, TIED_COPY, False):
        return False
    return tp_rank == 0 or bool(getattr(parameter, SHARED_OUT, False))


def square_sum(gradients: Sequence[Tensor], *, device: torch.device) -> Tensor:
    """Sum of squares of a rank's gradients as an fp32 scalar on device, without a device sync."""
    filled = [g.detach() for g in gradients if g.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float32, device=device)
    norms = torch._foreach_norm([g.float() if g.dtype != torch.float32 else g for g in filled])
    return torch.stack([n.to(device) for n in norms]).square().sum()


def global_norm(local_square_sum: Tensor) -> Tensor:
    """Root of the sum over all ranks; a non-finite result becomes -1, DeepSpeed's mark for it.

    One message over the whole world: every value is counted on one rank only, and the number of
    optimizer groups, which differs between pipeline stages, does not matter.
    """
    total = local_square_sum.clone()
    dist.all_reduce(total)
    total = total.sqrt()
    return torch.where(total.isfinite(), total, torch.full_like(total, -1.0))
