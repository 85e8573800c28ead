"""Context parallelism: which part of a sequence a rank holds, and how keys and values reach its queries.

A sequence is cut into 2 x cp equal chunks. Rank r holds chunk r and chunk 2 x cp - 1 - r: the
first attends to little before it, the second to much, and all pairs to equally much (zig-zag).

The exchanges, for s tokens, h query heads and g key/value heads of a tensor-parallel rank:

- allgather: every rank gathers all keys and values, 2 g s numbers.
- ulysses: ranks exchange heads for tokens, (2 h + 2 g) s / cp numbers, so each sees the whole
  sequence for h / cp heads.
- ring: keys and values go round in cp - 1 steps, beside the attention to those that are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.config.deepspeed import GPUS_PER_NODE

if TYPE_CHECKING:
    from toolkit.config.schema import RunConfig

RING_FROM = 8192  # tokens of a rank from which attention to a block takes longer than the block's way between hosts


@dataclass(frozen=True)
class Exchange:
    """name: allgather, ulysses or ring; reason: in words, why it was chosen."""

    name: str
    reason: str


def chunks_of(rank: int, cp: int) -> tuple[int, int]:
    """The two chunks that a rank holds, of 2 x cp."""
    return rank, 2 * cp - 1 - rank


def holders(cp: int) -> list[tuple[int, int]]:
    """For each chunk in the sequence's order, the rank that holds it and whether it is that rank's
    first or second.
    """
    return [(rank, 0) for rank in range(cp)] + [(rank, 1) for rank in reversed(range(cp))]


def fits_ulysses(*, heads: int, cp: int) -> bool:
    """Whether each rank gets whole query heads. heads: of a tensor-parallel rank."""
    return heads % cp == 0


def sent_heads(*, heads: int, groups: int, cp: int) -> list[list[int]]:
    """The key/value heads that each rank's query heads read under Ulysses, equally many for all.

    Where several ranks share a key/value head, each gets it; where a rank's query heads begin in
    the middle of what shares one, it gets one for each query head.
    """
    each, shared = heads // cp, heads // groups
    if each % shared == 0 or shared % each == 0:
        return [sorted({q // shared for q in range(r * each, (r + 1) * each)}) for r in range(cp)]
    return [[q // shared for q in range(r * each, (r + 1) * each)] for r in range(cp)]


def numbers_moved(name: str, *, heads: int, groups: int, cp: int, tokens: int) -> tuple[int, int]:
    """Keys, values, queries and results that a rank receives from others in one layer's forward and
    backward, in elements of one head's width. heads, groups: of a tensor-parallel rank; tokens: of
    a rank.
    """
    others = cp - 1
    if name == "ulysses":
        group = len(sent_heads(heads=heads, groups=groups, cp=cp)[0])
        each = tokens * (2 * heads // cp + 2 * group) * others
        return each, each
    block = 2 * groups * tokens
    # the ring sends keys and values round once more, and gradients all the way home
    return block * others, block * others + block * cp if name == "ring" else block * others


def choose(wanted: str, *, heads: int, groups: int, cp: int, tp: int, seq: int, dropout: bool, fp32: bool = False) -> Exchange:
    """The exchange of a run. wanted: parallel.cp_exchange; heads, groups: of a tensor-parallel
    rank; seq: of the whole sequence.

    dropout, fp32: what the kernels of a ring do not take.
    """
    if wanted != "auto":
        return Exchange(wanted, "as parallel.cp_exchange asks")
    if tp * cp > GPUS_PER_NODE and seq // cp >= RING_FROM and not dropout and not fp32:
        return Exchange(
            "ring", f"tp x cp = {tp * cp} ranks span hosts, and attention to {seq // cp} tokens hides a block's way between them"
        )
    moved = {n: numbers_moved(n, heads=heads, groups=groups, cp=cp, tokens=seq // cp)[0] for n in ("allgather", "ulysses")}
    if fits_ulysses(heads=heads, cp=cp) and moved["ulysses"] < moved["allgather"]:
        return Exchange("ulysses", f"it moves {moved['ulysses'] / moved['allgather']:.2f} of what gathering keys and values would")
    if not fits_ulysses(heads=heads, cp=cp):
        return Exchange("allgather", f"ulysses cannot cut {heads} heads by {cp}")
    return Exchange("allgather", f"{groups} key/value heads of {heads} are less to move than heads for tokens")


def chosen_exchange(config: RunConfig) -> Exchange:
    """The exchange of a config's run, with context parallelism."""
    p, spec = config.parallel, config.model.spec
    return choose(
        p.cp_exchange,
        heads=spec.heads // p.tp,
        groups=spec.groups // p.tp,
        cp=p.cp,
        tp=p.tp,
        seq=config.train.seq_length,
        dropout=config.model.dropout > 0,
        fp32=config.train.precision == "fp32",
    )
