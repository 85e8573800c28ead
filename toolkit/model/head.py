"""The output layer and cross entropy in one, a piece of the sequence at a time, over all
tensor-parallel parts of the vocabulary.

Only the log-sum-exp of each token is kept for the backward, which multiplies once more to get the
logits of a piece back. What that saves is the logits in the model's precision and in fp32, which
for 128k tokens and 128k words are 96 GiB; what it costs is a third more work in the output layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.mappings import _gather_along_first_dim, _reduce_scatter_along_first_dim
from torch import Tensor

from toolkit.parallel.loss_chunks import loss_chunk


class Head(layers.ColumnParallelLinear):
    """megatron-core's output layer; where it has labels, it returns the per-token losses [s, b] in
    fp32 in the place of logits.
    """

    mode: str
    vocab_size: int  # ids beyond only pad the vocabulary
    labels: Tensor | None  # [b, s]

    def prepare(self, *, mode: str, vocab_size: int) -> None:
        """mode: train.chunked_loss; call once, on a layer that was made as megatron-core's."""
        self.mode, self.vocab_size, self.labels = mode, vocab_size, None

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> Any:
        labels, self.labels = self.labels, None
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)
        chunk = loss_chunk(self.mode, tokens=labels.numel(), columns=self.output_size_per_partition)
        losses = _Losses.apply(input_, self.weight if weight is None else weight, labels.t().contiguous(), self, chunk)
        return losses, None

    def in_chunks(self, labels: Tensor) -> bool:
        """Whether the losses of such a micro-batch are computed piece by piece."""
        return loss_chunk(self.mode, tokens=labels.numel(), columns=self.output_size_per_partition) > 0

    def logits(self, rows: Tensor, weight: Tensor) -> Tensor:
        """fp32 logits of some tokens, in memory of their own: -inf for ids that only pad the vocabulary."""
        found = (rows @ weight.t()).float()
        first = self.vocab_size - found.shape[-1] * self.tp_group.rank()
        if first < found.shape[-1]:
            found[:, max(0, first) :] = -torch.inf
        return found


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, head: Head, chunk: int) -> Tensor:
        rows = _whole(hidden, head)
        ids, mine = _local(labels, weight, head)
        n = ids.numel()
        largest, total, picked = (rows.new_empty(n, dtype=torch.float32) for _ in range(3))
        for at in _pieces(n, chunk):
            logits = head.logits(rows[at], weight)
            picked[at] = logits.gather(1, ids[at].unsqueeze(1)).squeeze(1)
            largest[at] = logits.amax(dim=1)
            total[at] = logits.sub_(largest[at].unsqueeze(1)).exp_().sum(dim=1)
        picked.masked_fill_(~mine, 0.0)
        if head.tp_group.size() > 1:
            own = largest.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=head.tp_group)
            sums = torch.stack([total.mul_((own - largest).exp_()), picked])
            dist.all_reduce(sums, group=head.tp_group)
            total, picked = sums
        lse = total.log().add_(largest)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.head, ctx.chunk = head, chunk
        ctx.main_grad = getattr(weight, "main_grad", None) if head.gradient_accumulation_fusion else None
        return (lse - picked).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse = ctx.saved_tensors
        head: Head = ctx.head
        rows = _whole(hidden, head)
        ids, mine = _local(labels, weight, head)
        scale = gradients[0].reshape(-1, 1).float()
        d_rows = torch.empty_like(rows)
        # pieces add up in fp32: 16 bits would lose the last ones
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if ctx.main_grad is None else ctx.main_grad
        for at in _pieces(len(ids), ctx.chunk):
            d_logits = head.logits(rows[at], weight).sub_(lse[at].unsqueeze(1)).exp_()
            d_logits.scatter_add_(1, ids[at].unsqueeze(1), -mine[at].float().unsqueeze(1))
            d = d_logits.mul_(scale[at]).to(weight.dtype)
            torch.mm(d, weight, out=d_rows[at])
            if weight.dtype == torch.float32:
                d_weight.addmm_(d.t(), rows[at])
            else:
                d_weight += d.t() @ rows[at]
        if head.sequence_parallel:
            d_hidden = _reduce_scatter_along_first_dim(d_rows.view(*labels.shape, -1), head.tp_group)
        else:
            d_hidden = d_rows.view(hidden.shape)
            if head.tp_group.size() > 1:
                dist.all_reduce(d_hidden, group=head.tp_group)
        return d_hidden, None if ctx.main_grad is not None else d_weight.to(weight.dtype), None, None, None


def _whole(hidden: Tensor, head: Head) -> Tensor:
    """All tokens as [s * b, h]; under sequence parallelism they are gathered."""
    if head.sequence_parallel:
        hidden = _gather_along_first_dim(hidden, head.tp_group)
    return hidden.reshape(-1, hidden.shape[-1])


def _local(labels: Tensor, weight: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Labels as columns of this rank's part of the vocabulary, and which of them lie there."""
    columns = weight.shape[0]
    ids = labels.flatten() - columns * head.tp_group.rank()
    return ids.clamp(0, columns - 1), (ids >= 0) & (ids < columns)


def _pieces(n: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]
