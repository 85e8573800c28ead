"""Layers whose weights the copies of a model share out: ZeRO-3 brings a whole layer as it is
called, and frees it afterwards.

sharded = ShardedLayers(model.decoder.layers, decoder.layers)
engage(sharded)                         # what brings weights hooks itself in at ShardedLayers.WHOLE
hidden = sharded.run(hidden, cache)     # every copy must run as often as the others
sharded.keep_up()                       # … so a copy that has nothing left to do runs along
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from toolkit.model.cache import KeyValueCache

COUNTED = 3  # passes in which memory is counted, which takes about as long as a small layer
Compute = Callable[[Tensor, KeyValueCache], Tensor]


class WholeLayer(torch.nn.Module):
    """A layer as a module that may be called, whose weights come and go together."""

    def __init__(self, weights: torch.nn.Module, compute: Compute) -> None:
        super().__init__()
        self.weights, self.compute = weights, compute

    def forward(self, x: Tensor, *, cache: KeyValueCache | None) -> Tensor:
        return x if cache is None else self.compute(x, cache)


class ShardedLayers(torch.nn.Module):
    """The layers of a stage. weights: megatron-core's modules; compute: what each of them computes."""

    WHOLE = WholeLayer

    def __init__(self, weights: Iterable[torch.nn.Module], compute: Sequence[Compute], *, device: torch.device) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(WholeLayer(w, self._counted(c)) for w, c in zip(weights, compute, strict=True))
        self.copies = parallel_state.get_data_parallel_group()
        self.busy, self.nothing = torch.zeros((), device=device), torch.zeros((), device=device)
        self.passes = 0
        self.whole = 0
        """Most bytes of whole weights that were in memory at once."""
        self.parts = 0
        """Bytes of this copy's parts."""

    def forward(self, x: Tensor, *, cache: KeyValueCache | None) -> Tensor:
        self.passes += 1
        for layer in self.layers:
            x = layer(x, cache=cache)
        return x

    def run(self, x: Tensor, cache: KeyValueCache) -> Tensor:
        """Through the layers, [b, s, h] to [b, s, h]."""
        self._any_busy(True)
        found: Tensor = self(x, cache=cache)
        return found

    def keep_up(self) -> None:
        """Take part in the passes of other copies, until none has any."""
        while self._any_busy(False):
            self(self.nothing, cache=None)

    def _any_busy(self, busy: bool) -> bool:
        if dist.get_world_size(self.copies) == 1:
            return busy
        self.busy.fill_(busy)
        dist.all_reduce(self.busy, group=self.copies)
        return bool(self.busy)

    def _counted(self, compute: Compute) -> Compute:
        """A layer's computation that looks at the start what is in memory, until the order of
        layers is known to what brings them.
        """

        def count(x: Tensor, cache: KeyValueCache) -> Tensor:
            if self.passes <= COUNTED:
                self.whole = max(self.whole, sum(p.nbytes for p in self.parameters()))
            return compute(x, cache)

        return count
