"""Moments of a backward at which DeepSpeed's ZeRO-2 or 3 sends gradients: what each takes beside the states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

from toolkit.cost.gathers import freed_behind, gathered, gathers, largest_cut
from toolkit.cost.rank_weights import RankWeight, edge_weights, layer_weights
from toolkit.cost.workload import Workload
from toolkit.parallel.order import warmup

LAST_BUCKET = "last bucket of chunk"  # a moment's name


def reductions(w: Workload, stage: int, held: float, *, redone: float) -> dict[str, dict[str, float]]:
    """Moments at which DeepSpeed's ZeRO-2 or 3 sends a bucket: it flattens what lies in it once more.

    Gradients come from the last weight to the first. A weight that does not fit any more sends the bucket first, one that is larger than
    the bucket is sent by itself. The last bucket goes at the end of a backward; in 16 bits ZeRO-2 then copies a weight's part for this
    rank to fp32 before it adds it. held: bytes of activations before the backward; redone: of what a layer's
    backward computes again.
    """
    ahead = min(warmup(stage=stage, pp=w.pp, vpp=w.vpp, microbatches=w.microbatches) + 1, w.microbatches * w.vpp)
    running = held / ahead
    # gradients are whole from the first backward's end on, when a batch that is all in flight has one micro-batch less
    first = running if w.zero == 2 and 1 < ahead == w.microbatches * w.vpp else 0.0
    found: dict[str, dict[str, float]] = {}
    # buckets fill alike whatever the batch and the recomputation
    for sent in _sends(w.laid_out(micro=1, batch=w.dp, recompute="none", sp=False), stage):
        if sent.last:
            found[sent.moment] = {"activations": held - running, "working set": sent.nbytes + sent.inside}
            if w.zero == 3:  # weights have been freed; where a pipeline goes on, the next forward's first is being made whole
                there = 2.0 * w.width * largest_cut(w, stage) if gathers(w) and w.pp > 1 else 0.0
                found[sent.moment]["working set"] += there - gathered(w, stage)
            continue
        left = held - running * (1 - sent.layer / max(1, sent.layers)) - first
        more = sent.nbytes if sent.alone else sent.nbytes + max(redone, sent.inside)
        found[sent.moment] = {"activations": left, "working set": more - freed_behind(w, stage, sent.chunk, sent.layer)}
    return found


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """One send of gradients in the backward of a chunk, when it is at a layer (of so many); alone: of one weight that no bucket holds;
    last: at the backward's end. nbytes: what sending takes; inside: what copying one of its gradients takes."""

    moment: str
    chunk: int
    layer: int
    layers: int
    nbytes: float
    inside: float = 0.0
    alone: bool = False
    last: bool = False


@lru_cache(maxsize=512)
def _sends(w: Workload, stage: int) -> tuple[_Sent, ...]:
    """Every send of a backward, chunk by chunk."""
    part, bucket = ceil(w.parameters_on(stage) / w.shards), w.bucket
    before, after = edge_weights(w, stage)
    copied = w.zero == 2 and w.width < 4
    upcast = {x: _upcast(w, x, part) for side in (before, layer_weights(w), after) for x in side}
    found = []
    for chunk in range(w.vpp):
        count = w.layers_in(stage, chunk)
        ordered = [(x, 0) for x in before if chunk == 0]
        ordered += [(x, layer) for layer in range(count) for x in layer_weights(w)]
        ordered += [(x, count) for x in after if chunk == w.vpp - 1]
        filled, inside = 0, 0.0
        for weight, layer in reversed(ordered):
            if filled + weight.count > bucket:
                at: dict[str, Any] = {"chunk": chunk, "layer": layer, "layers": count}
                if weight.count > bucket:
                    nbytes = _alone(w, weight.count) + upcast[weight]
                    found.append(_Sent(moment=f"gradient of {weight.count} elements at layer {layer}", nbytes=nbytes, alone=True, **at))
                    continue
                nbytes = _scattered(w, filled)
                found.append(_Sent(moment=f"bucket of chunk {chunk} at layer {layer}", nbytes=nbytes, inside=inside, **at))
                filled, inside = 0, 0.0
            filled += weight.count
            if copied:
                inside = max(inside, upcast[weight])
        end = _Sent(
            moment=f"{LAST_BUCKET} {chunk}", chunk=chunk, layer=0, layers=count, nbytes=_scattered(w, filled), inside=inside, last=True
        )
        found.append(end)
    return tuple(found)


def _alone(w: Workload, elements: int) -> float:
    """Bytes that sending one gradient takes that is larger than the bucket; ZeRO-3 sends one as it is where its parts are equal."""
    if w.zero < 3:
        return 2.0 * w.width * elements
    return _scattered(w, elements) - (w.width * elements if elements % w.shards == 0 else 0.0)


def _scattered(w: Workload, elements: int) -> float:
    """Bytes that sending so many gradients takes: they are flattened once more, and what ZeRO-3 gets back of them in 16 bits becomes fp32."""
    return w.width * elements + (4.0 * ceil(elements / w.shards) if w.zero == 3 and w.width < 4 else 0.0)


def _upcast(w: Workload, weight: RankWeight, part: int) -> float:
    """Bytes of a weight's gradient as it is added to this rank's share: in 16 bits its part of the share, copied to fp32."""
    if w.zero == 3 or w.width == 4:
        return 0.0
    return 4.0 * (min(weight.count, part) if weight.group != 2 else ceil(weight.count / w.shards))
