"""The loss: today's mean, a loss of the user's own, and cross entropy on logits that tensor
parallel ranks share.

A loss is a function of (output, batch) that returns one number, a tensor of shape [], for one
micro-batch:

- output: the per-token cross entropy, [b, s] in fp32; or, for a function with the attribute `needs
  = "logits"`, the logits [s, b, v/tp] in the model's precision, of which each tensor parallel rank
  holds its own part of the vocabulary. Ids that only pad the vocabulary have the logit -inf.
- batch: the micro-batch, {"tokens": [b, s], "labels": [b, s]} and whatever else the data set gives.

The number is the mean over the tokens that this rank was given (with context parallelism: over its
part of the sequence). Micro-batches and data parallel ranks then count alike: a loss that divides
by the number of its own unmasked tokens weighs a token by its micro-batch.

Where the data leaves tokens out ("loss_mask" [b, s], or the ends of documents and padding with
data.document_mask), the batch has "weights" [b, s] in fp32. The number is then the sum of what each
token loses times its weight: tokens left out weigh 0, and all others weigh the same over the whole
global batch, whatever the layout. The loss that no function is given for does so by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.errors import ConfigError, ToolkitError, TrainingError, name_of, raised_by

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core laments optional packages at import
    from megatron.core import parallel_state as state
    from megatron.core import tensor_parallel

Batch = dict[str, Tensor]
LossFunction = Callable[[Tensor, Batch], Tensor]

NEEDS = ("losses", "logits")


class Loss:
    """What the schedule calls on the last stage for each micro-batch.

    An error of the user's function is kept in `error`, and the micro-batch goes on with a loss of
    0: other ranks wait for this one in the middle of a step, so that it can be said only once all
    of them listen.
    """

    def __init__(self, function: LossFunction | None = None, *, rank: int = 0) -> None:
        self.function, self.rank = function, rank
        self.needs = getattr(function, "needs", "losses")
        self.error: ToolkitError | None = None
        if self.needs not in NEEDS:
            raise ConfigError(
                f"the loss {name_of(function)} needs {self.needs!r}",
                why="a loss is given the per-token losses or the logits",
                fix='Set its attribute needs to "losses" or to "logits".',
            )

    def __call__(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The scalar to differentiate, which the schedule divides in place, and a copy of its
        value.
        """
        if self.function is None and "weights" in batch:
            loss = (output.float() * batch["weights"]).sum()
            return loss, loss.detach().clone()
        if self.function is None:
            loss = output.float().mean()
            return loss, loss.detach().clone()
        try:
            found = self.function(output if self.needs == "logits" else output.float(), batch)
            self._check(found, output)
            loss = found.float() * 1.0  # a tensor of our own: the function may need its result unchanged for its backward
        except ToolkitError as error:
            loss = self._failed(error, output)
        except Exception as error:
            loss = self._failed(raised_by(f"the loss {name_of(self.function)}", error, rank=self.rank), output)
        return loss, loss.detach().clone()

    def _failed(self, error: ToolkitError, output: Tensor) -> Tensor:
        self.error = self.error or error
        return (output[:1].float() * 0.0).nan_to_num().sum()  # 0, with a backward that runs

    def _check(self, found: Any, output: Tensor) -> None:
        name = name_of(self.function)
        if not isinstance(found, Tensor) or found.dim():
            what = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"{found!r}, a {type(found).__name__}"
            raise TrainingError(
                f"the loss {name} returned {what}",
                why="a loss is one number for each micro-batch, a tensor of shape []",
                fix="Return the mean over the tokens.",
            )
        if found.device != output.device:
            raise TrainingError(f"the loss {name} returned a tensor on {found.device}, and the model is on {output.device}")
        if torch.is_grad_enabled() and not found.requires_grad:
            raise TrainingError(
                f"the loss {name} returned a number without a gradient",
                why="nothing would be learned from it",
                fix="Compute it from its first argument, without detach(), item() or no_grad().",
            )


def logits_as_output(chunk: Any) -> None:
    """Let a chunk with the output layer return its logits [s, b, v/tp] where it would return
    per-token losses [b, s].
    """
    chunk.output_layer.mode = "never"
    chunk.compute_language_model_loss = lambda labels, logits: logits


class _LogSumExp(torch.autograd.Function):
    """log(sum(exp(logits))) over all parts of the vocabulary; the logits themselves stay as they
    are.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        group = state.get_tensor_model_parallel_group()
        largest = logits.amax(dim=-1).float()  # [s, b]
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        total = (logits.float() - largest.unsqueeze(-1)).exp_().sum(dim=-1)
        dist.all_reduce(total, group=group)
        result = total.log_().add_(largest)
        ctx.save_for_backward(logits, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        logits, result = ctx.saved_tensors
        softmax = (logits.float() - result.unsqueeze(-1)).exp_()
        return softmax.mul_(gradients[0].unsqueeze(-1)).to(logits.dtype)


def log_sum_exp(logits: Tensor) -> Tensor:
    """The logarithm of the softmax's denominator for each token, [b, s] in fp32, alike on all
    tensor parallel ranks.

    logits: [s, b, v/tp]. z-loss is the mean of its square.
    """
    found: Tensor = _LogSumExp.apply(logits)
    return found.t()


def label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of each token's label, [b, s] in fp32, alike on all tensor parallel ranks. logits:
    [s, b, v/tp]; labels: [b, s].
    """
    rows = logits.shape[-1]
    ids = labels.t() - rows * state.get_tensor_model_parallel_rank()  # [s, b], counted from this rank's first row
    elsewhere = (ids < 0) | (ids >= rows)
    picked = logits.gather(-1, ids.clamp(0, rows - 1).unsqueeze(-1)).squeeze(-1).float().masked_fill(elsewhere, 0.0)
    found: Tensor = tensor_parallel.reduce_from_tensor_model_parallel_region(picked)
    return found.t()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-token cross entropy, [b, s] in fp32, alike on all tensor parallel ranks. logits: [s, b,
    v/tp]; labels: [b, s].
    """
    return log_sum_exp(logits) - label_logits(logits, labels)
