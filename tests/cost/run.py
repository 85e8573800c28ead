"""One parity cell on every rank of its world: what the estimate says of this rank, and what the live engine holds."""

from __future__ import annotations

from typing import Any

from tests.rank import Rank


def measure_cell(cell: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Two steps of cell["config"], the second measured; bytes by part, predicted and measured.

    cell["follow"]: follow every storage as well. cell["hoard"]: let the optimizer keep a second copy of the weights that nothing needs.
    """
    from toolkit.cost.workload import Workload
    from toolkit.engine.schedule import observed
    from toolkit.profile.live_tensors import Live, StepMeter
    from toolkit.profile.predict import hardware_here, memory

    with Live() as left:  # by earlier cells of this worker
        pass
    rank = Rank(cell["config"])
    config, world, at, engine, chunks = rank.config, rank.world, rank.at, rank.engine, rank.chunks

    def step(number: int) -> None:
        # clones: views would keep the whole global batch, which a real loader never makes
        rank.forward_backward([{k: v.clone() for k, v in batch.items()} for batch in rank.micro(number)])
        engine.finish()

    step(0)
    if cell.get("hoard"):
        engine.optimizer.hoarded = [p.detach().clone() for chunk in chunks for p in chunk.parameters()]
    with StepMeter(engine, follow=cell.get("follow", False)) as meter, observed(meter.around):
        step(1)
    predicted = memory(Workload.of(config, world.size), hardware_here(gpu=None, ranks=world.size), at.pp, dp_rank=rank.layout.copy_of(at))
    return {"predicted": predicted, "measured": {**meter.measured.parts, "peak": meter.measured.peak - left.now}}
