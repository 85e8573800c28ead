"""ZeRO-0/1: gradients accumulate in one flat fp32 buffer per optimizer group and are reduced once a step.

The buffer has the layout of DeepSpeed's flat parameters, so the reduced partition is handed to its
optimizer as it is: none of the copies between .grad, bucket, list and flat partition are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers
from torch import Tensor

from toolkit.engine.grads import partial_over_tp, sum_over_tp, sum_tied


@dataclass(frozen=True)
class Groups:
    """The process groups that gradients are summed over."""

    data: dist.ProcessGroup
    tensor: dist.ProcessGroup
    embedding: dist.ProcessGroup | None  # first and last stage, where a tied embedding has two copies


class GradientSlices(list):
    """A rank's gradient partition: the slices of its parameters, and the flat tensor they are views of."""

    flat_partition: Tensor


class FlatGradients:
    """One optimizer group's gradients.

    flat: DeepSpeed's flat parameters, of which the parameters are views. partitions: into how many
    equal parts data-parallel ranks cut it (1: each keeps the whole, as in ZeRO-0).
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        groups: Groups,
        *,
        flat: Tensor,
        partitions: int,
        tied: torch.nn.Parameter | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.groups = groups
        self.partitions = partitions
        self.buffer = torch.zeros(flat.numel(), dtype=torch.float32, device=flat.device)
        self.offsets = [p.storage_offset() - flat.storage_offset() for p in self.parameters]
        self.views = [self.buffer[o : o + p.numel()].view_as(p) for p, o in zip(self.parameters, self.offsets, strict=True)]
        view_of = {id(p): v for p, v in zip(self.parameters, self.views, strict=True)}
        self.partial = [view_of[id(p)] for p in partial_over_tp(self.parameters)]
        self.tied = view_of.get(id(tied)) if tied is not None else None
        self.low_precision = self.parameters[0].dtype != torch.float32
        if self.low_precision:
            # bf16/fp16 gradients are added up in fp32 as they appear: many small terms would be lost
            for p, view in zip(self.parameters, self.views, strict=True):
                p.register_post_accumulate_grad_hook(_accumulate_into(view))
        else:
            for p, view in zip(self.parameters, self.views, strict=True):
                p.main_grad = view  # type: ignore[attr-defined]  # megatron-core's name for it

    def attach(self) -> None:
        """Start a step: an empty buffer that autograd adds to in place."""
        self.buffer.zero_()
        if not self.low_precision:
            for p, view in zip(self.parameters, self.views, strict=True):
                p.grad = view

    def reduce(self) -> Tensor:
        """Sum what ranks hold parts of, average over DP; returns this rank's flat partition."""
        if self.partial and dist.get_world_size(self.groups.tensor) > 1:
            sum_over_tp(self.partial, self.groups.tensor)
        if self.tied is not None and self.groups.embedding is not None:
            sum_tied(self.tied, self.groups.embedding)
        dp = dist.get_world_size(self.groups.data)
        if dp == 1:
            return self.buffer
        self.buffer.div_(dp)
        if self.partitions == 1:
            dist.all_reduce(self.buffer, group=self.groups.data)
            return self.buffer
        part = self.buffer.view(self.partitions, -1)[dist.get_rank(self.groups.data)]
        if dist.get_backend(self.groups.data) == "nccl":
            dist.reduce_scatter_tensor(part, self.buffer, group=self.groups.data)
        else:
            dist.all_reduce(self.buffer, group=self.groups.data)  # gloo has no reduce-scatter in older torch
        return part

    def slices(self, partition: Tensor, parameters: Sequence[torch.nn.Parameter] | None = None) -> GradientSlices:
        """The given parameters' slices of a reduced partition, in their order."""
        start = partition.storage_offset()
        end = start + partition.numel()
        place = {id(p): (o, o + p.numel()) for p, o in zip(self.parameters, self.offsets, strict=True)}
        found = GradientSlices()
        for p in self.parameters if parameters is None else parameters:
            low, high = place[id(p)]
            found.append(self.buffer[max(low, start) : max(low, start, min(high, end))])
        found.flat_partition = partition
        return found


def add_within_product(module: torch.nn.Module) -> None:
    """Let megatron-core's linears add a weight's gradient to its fp32 main_grad as the matrix
    product's own last step.

    Without it each micro-batch writes the gradient to new memory and reads it back to add it. megatron-core
    calls an Apex kernel for it; where that is absent, torch's addmm does the same on any device.
    """
    if not hasattr(layers, "fused_weight_gradient_mlp_cuda"):
        layers.fused_weight_gradient_mlp_cuda = _Products
    for linear in module.modules():
        if isinstance(linear, (layers.ColumnParallelLinear, layers.RowParallelLinear)):
            linear.gradient_accumulation_fusion = True


class _Products:
    """Under the name and with the call of Apex's module."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, gradient: Tensor, total: Tensor) -> None:
        total.addmm_(gradient.t(), inputs)  # [out, in] += [tokens, out]ᵀ [tokens, in]


def _accumulate_into(view: Tensor):  # type: ignore[no-untyped-def]
    def hook(parameter: torch.nn.Parameter) -> None:
        view.add_(parameter.grad)  # type: ignore[arg-type]
        parameter.grad = None

    return hook
