"""megatron-core's schedules (none, 1F1B, interleaved) driving the model chunks of one stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from torch import Tensor

from toolkit.engine.batch import part_of
from toolkit.engine.loss import Batch, Loss, logits_as_output
from toolkit.parallel.layout import Layout


class ChunkView(torch.nn.Module):
    """What a schedule sees of one model chunk: its config and inputs, with forward going where we say.

    engine.config is DeepSpeed's dict, so the schedule must not be given the engine itself.
    """

    chunk: Any
    call: Callable[..., Tensor]

    def __init__(self, chunk: Any, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "chunk", chunk)  # not a submodule: the engine owns the parameters
        object.__setattr__(self, "call", forward)
        self.config = chunk.config
        self.model_type = chunk.model_type
        self.vp_stage = getattr(chunk, "vp_stage", None)
        self.xattn_needed = False

    def set_input_tensor(self, tensor: Any) -> None:
        self.chunk.set_input_tensor(tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.call(*args, **kwargs)


class Schedule:
    """Runs the micro-batches of one global batch through this rank's chunks. loss: the mean over
    all tokens if it is not given.
    """

    def __init__(
        self, views: Sequence[ChunkView], layout: Layout, *, seq_length: int, micro_batch_size: int, loss: Loss | None = None
    ) -> None:
        self.views = list(views)
        self.loss = loss or Loss()
        if self.loss.needs == "logits":
            for view in self.views:
                if view.chunk.post_process:
                    logits_as_output(view.chunk)
        self.layout = layout
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.run = get_forward_backward_func()
        self.positions: Tensor | None = None

    def __call__(self, batches: Callable[[], Iterator[Batch]], *, num_microbatches: int, forward_only: bool = False) -> Tensor | None:
        """Mean loss over this rank's micro-batches on the last stage, None elsewhere; gradients accumulate.

        batches: called once per chunk; each iterator yields {"tokens", "labels"} of shape [b, s],
        and what else the loss asks for. "bounds" and "positions" (see toolkit.engine.batch) keep
        documents apart.
        """
        losses = self.run(
            forward_step_func=self._forward_step,
            data_iterator=[batches() for _ in self.views] if len(self.views) > 1 else batches(),
            model=self.views if len(self.views) > 1 else self.views[0],
            num_microbatches=num_microbatches,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
        )
        return torch.stack(losses).mean() if losses else None

    def _forward_step(self, batches: Iterator[Batch], view: ChunkView) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(batches)
        if self.layout.cp > 1:
            batch = part_of(batch, self.layout, rank=parallel_state.get_context_parallel_rank())
        tokens, labels = batch["tokens"], batch["labels"]
        if "bounds" in batch or self.layout.cp > 1:
            return view(tokens, batch["positions"], batch.get("bounds"), labels=labels), partial(self._loss, batch=batch)
        if self.positions is None or self.positions.shape != tokens.shape or self.positions.device != tokens.device:
            self.positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return view(tokens, self.positions, None, labels=labels), partial(self._loss, batch=batch)

    def _loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, value = self.loss(output, batch)
        # megatron-core's schedule multiplies by the context-parallel ranks, over which the engine averages
        return (loss / self.layout.cp if self.layout.cp > 1 else loss), value


@contextmanager
def observed(around: Callable[[str], AbstractContextManager[None]]) -> Iterator[None]:
    """Run every micro-batch's forward and backward inside around("forward") and around("backward"):
    the only place that sees each.
    """
    module: Any = schedules
    kept = {name: getattr(module, f"{name}_step") for name in ("forward", "backward")}

    def inside(kind: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with around(kind):
                return kept[kind](*args, **kwargs)

        return call

    try:
        for kind in kept:
            setattr(module, f"{kind}_step", inside(kind))
        yield
    finally:
        for kind, function in kept.items():
            setattr(module, f"{kind}_step", function)
