"""Where a session's layers are: cut by what its devices can do before the model is read, and moved
between prompts. No torch of its own.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from toolkit.cost.generation import Generation
from toolkit.errors import ConfigError, OutOfMemory
from toolkit.plan.cut import Cut, StagePace, choose_cut

if TYPE_CHECKING:
    from toolkit.inference.pace import Pace
    from toolkit.inference.run import Session

WORTH = 0.05  # a share of time, below which the even cut stays: measuring is no more exact
WORTH_MOVING = 0.2  # the same between prompts: the model is read anew for it
logger = logging.getLogger(__name__)


def cut_as_measured(session: Session) -> None:
    """Cut the layers by what each stage's device takes for one of them, and by how many it can
    hold; all ranks call it.
    """
    from toolkit.inference.pace import all_stages, one_layer, time_layer
    from toolkit.parallel.agree import everywhere

    way = _most_asked(session)
    in_flight = min(session.layout.pp, way.batch)
    room, world, stages = _room(session), session.world, []

    def build() -> None:
        with session.naming_memory("one layer, to measure it"):
            stages.append(one_layer(session.config, session.layout, rank=world.rank, device=world.device, savings=session.savings))

    everywhere(build)  # a rank that has no memory for it must not leave others waiting in a sum

    def mine() -> Pace:
        with session.naming_memory("one layer, to measure it"):
            return time_layer(stages.pop(), texts=-(-way.batch // in_flight), room=room)

    session.paces = all_stages(mine, layout=session.layout, way=way)
    cut = choose_cut(way.model.layers, session.paces, in_flight=in_flight, worth=WORTH)
    session.layout, session.reasons = replace(session.layout, layers_per_stage=cut.counts), cut.reasons
    gc.collect()  # megatron-core's modules refer to each other
    if world.rank == 0:
        for reason in cut.reasons:
            logger.warning("measured: %s", reason)


def rebalance(session: Session) -> str | None:
    """Compare what the last prompts took with other cuts, and take one that is faster by more than
    WORTH_MOVING, or that fits where the present one does not. Returns what was done, on all ranks;
    all ranks call it.
    """
    from toolkit.inference.pace import all_stages, pace_of
    from toolkit.model.savings import weight_bytes

    before = tuple(session.layers_per_stage)
    if session.stage.spans is None:
        return None

    def mine() -> Pace:
        stage = session.stage
        room = _room(session) + weight_bytes(stage.model)  # which a smaller part would give back
        return pace_of(stage.spans or {}, layers=len(stage.decoder.layers), room=room)

    in_flight = min(session.layout.pp, session.batch_rows)
    paces = all_stages(mine, layout=session.layout, way=_most_asked(session))
    session.stage.spans = {}
    if not all(p.layer for p in paces):  # answers of one token say nothing of how fast a stage is
        return None
    try:
        cut = choose_cut(sum(before), paces, in_flight=in_flight, now=before, worth=WORTH_MOVING)
    except ConfigError:  # no cut has the memory that a request may need at most; this one has worked so far
        return None
    if cut.counts == before:
        return None
    said = recut_line(before, cut, planned=session.paces, now=paces)
    layout, session.layout = session.layout, replace(session.layout, layers_per_stage=cut.counts)
    del session.stage  # two parts would not fit
    gc.collect()
    try:
        session.load(session.request)
    except OutOfMemory as error:
        session.layout = layout
        gc.collect()
        session.load(session.request)
        return f"not {said}: {error.what}"
    session.paces, session.reasons = paces, cut.reasons
    return said


def recut_line(before: Sequence[int], cut: Cut, *, planned: Sequence[StagePace], now: Sequence[StagePace]) -> str:
    """What a re-cut has changed and why, on one line."""
    words = [",".join(map(str, counts)) for counts in (before, cut.counts)]
    paces = []
    for number, pace in enumerate(now):
        assumed = f" ({planned[number].layer * 1e3:.3g} ms, {planned[number].most} before)" if planned else ""
        paces.append(f"stage {number} takes {pace.layer * 1e3:.3g} ms a layer and holds {pace.most}{assumed}")
    return f"re-cut from {words[0]} to {words[1]} layers: {', '.join(paces)}; {cut.reasons[-1].partition(': ')[2]}"


def _room(session: Session) -> float:
    from toolkit.inference.memory import room

    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", session.world.size))
    return room(session.world.device, limit_gib=session.request.memory_limit, ranks=on_host)


def _most_asked(session: Session) -> Generation:
    """What the request asks at most, as the estimate has it. No tokenizer makes more tokens of a
    text than it has bytes.
    """
    request, layout, known = session.request, session.layout, session.config.model.max_position_embeddings
    longest = max((len(p.encode()) for p in request.prompts), default=known)
    context = min(known, longest + request.max_new_tokens)
    prompts = -(-max(1, len(request.prompts)) // layout.dp)
    return Generation(
        model=session.config.model.spec,
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp,
        precision=session.config.train.precision,
        batch=min(request.batch, prompts),
        context=context,
        prompt=min(longest, context),
        weights=request.weights,
        kv=request.kv,
    )
