"""Where a rank sits: pure integers, in megatron-core's order (tp fastest, then cp, dp, pp)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.config.schema import RunConfig


@lru_cache(maxsize=4096)
def split_layers(num_layers: int, chunks: int) -> tuple[int, int] | None:
    """Return (layers_per_chunk, layers_saved_at_ends) of an even split, or None where there is none.

    Where the layers alone do not divide by the chunks, the output layer counts as a layer, so the
    last chunk holds one fewer. If that does not divide either, the embedding counts too, so the
    first chunk also holds one fewer. These are megatron-core's account_for_loss_in_pipeline_split
    and account_for_embedding_in_pipeline_split. No chunk is left without a layer.
    """
    for saved_at_ends in (0, 1, 2):
        per_chunk, rest = divmod(num_layers + saved_at_ends, chunks)
        if rest == 0 and per_chunk > (saved_at_ends > 0):
            return per_chunk, saved_at_ends
    return None


@dataclass(frozen=True)
class Coordinates:
    """One rank's place along each axis, counted from 0."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The degrees of one run and the micro-batches that follow from them."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    num_microbatches: int = 1
    layers_per_stage: tuple[int, ...] = ()
    """Layers of each stage where they are not cut evenly; only for generating, and without chunks."""

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> Layout:
        """Derive DP and the micro-batch count from the world size; assumes the rules hold."""
        p, t = config.parallel, config.train
        dp = world_size // (p.tp * p.pp * p.cp)
        return cls(
            tp=p.tp,
            pp=p.pp,
            vpp=p.vpp,
            cp=p.cp,
            dp=dp,
            sequence_parallel=p.sequence_parallel and p.tp > 1,
            micro_batch_size=t.micro_batch_size,
            num_microbatches=t.global_batch_size // (t.micro_batch_size * dp),
        )

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def copies(self) -> int:
        """Ranks that hold the same weights, over which gradients are averaged and ZeRO cuts states:
        data x context parallel.
        """
        return self.dp * self.cp

    def copy_of(self, at: Coordinates) -> int:
        """Which of the copies a rank is."""
        return at.dp * self.cp + at.cp

    def coordinates(self, rank: int) -> Coordinates:
        """Place of a global rank."""
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coordinates(tp=tp, cp=cp, dp=dp, pp=pp)

    def rank(self, at: Coordinates) -> int:
        """Global rank of a place; the inverse of coordinates()."""
        return at.tp + self.tp * (at.cp + self.cp * (at.dp + self.dp * at.pp))

    def layers_of(self, num_layers: int, *, stage: int, chunk: int = 0) -> range:
        """Global layer numbers (from 0) of a stage's chunk; chunk c of stage s is virtual stage c*pp + s.

        Assumes that split_layers() finds a split, or that layers_per_stage says what it is.
        """
        if self.layers_per_stage:
            first = sum(self.layers_per_stage[:stage])
            return range(first, first + self.layers_per_stage[stage])
        split = split_layers(num_layers, self.pp * self.vpp)
        assert split is not None, "the rules refuse it"
        per_chunk, saved_at_ends = split
        first = (chunk * self.pp + stage) * per_chunk - (saved_at_ends > 1)
        return range(max(0, first), min(num_layers, first + per_chunk))
