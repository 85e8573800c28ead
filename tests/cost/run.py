"""One parity cell on every rank of its world: what the estimate says of this rank, and what the live engine holds."""

from __future__ import annotations

from typing import Any

from tests.parity.run import micro_batches


def measure_cell(cell: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Two steps of cell["config"], the second measured; bytes by part, predicted and measured.

    cell["follow"]: follow every storage as well. cell["hoard"]: let the optimizer keep a second copy of the weights that nothing needs.
    """
    from toolkit.config.load import parse_config
    from toolkit.cost.workload import Workload
    from toolkit.engine.schedule import Schedule, observed
    from toolkit.engine.zero import Engine, partitioner
    from toolkit.model.build import build_chunks
    from toolkit.parallel.deepspeed_json import deepspeed_config
    from toolkit.parallel.rules import check
    from toolkit.profile.live_tensors import Live, StepMeter
    from toolkit.profile.predict import hardware_here, memory
    from toolkit.train.world import World, connect

    config = parse_config(cell["config"])
    world = World.from_environment()
    layout = check(config, world.size)
    connect(world, layout, seed=config.run.seed)
    ds_config = deepspeed_config(config, layout)
    with Live() as left:  # by earlier cells of this worker
        pass
    chunks = build_chunks(config, layout, device=world.device, partition=partitioner(config, ds_config))
    engine = Engine(chunks, config, layout, ds_config)
    schedule = Schedule(engine.views, layout, seq_length=config.train.seq_length, micro_batch_size=config.train.micro_batch_size)
    at = layout.coordinates(world.rank)

    def step(number: int) -> None:
        # clones: views would keep the whole global batch, which a real loader never makes
        micro = [{k: v.clone() for k, v in batch.items()} for batch in micro_batches(config, layout, at.dp, number)]
        engine.begin()
        schedule(lambda: iter(micro), num_microbatches=layout.num_microbatches)
        engine.finish()

    step(0)
    if cell.get("hoard"):
        engine.optimizer.hoarded = [p.detach().clone() for chunk in chunks for p in chunk.parameters()]
    with StepMeter(engine, follow=cell.get("follow", False)) as meter, observed(meter.around):
        step(1)
    predicted = memory(Workload.of(config, world.size), hardware_here(gpu=None, ranks=world.size), at.pp, dp_rank=at.dp)
    return {"predicted": predicted, "measured": {**meter.measured.parts, "peak": meter.measured.peak - left.now}}
