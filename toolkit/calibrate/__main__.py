"""`python -m toolkit.calibrate FOLDER THREADS PRECISION…`: one rank that measures; rank 0 writes FOLDER/ranks-N.json.

It is started by toolkit.calibrate.session, with RANK and WORLD_SIZE in its environment.
"""

from __future__ import annotations

import json
import logging
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def main(arguments: list[str]) -> int:
    """Measure all settings of this number of ranks, one after the other."""
    folder, threads, precisions = Path(arguments[0]), [int(n) for n in arguments[1].split(",")], arguments[2:]
    import torch
    import torch.distributed as dist

    from toolkit.calibrate import messages, pieces, programs
    from toolkit.calibrate.distance import Distances
    from toolkit.parallel.layout import Layout
    from toolkit.train.world import World, connect

    logging.disable(logging.WARNING)
    world = World.from_environment()
    connect(world, Layout(dp=world.size), seed=1, meeting=str(folder / f"meeting-{world.size}"))
    torch.manual_seed(1)
    settings: list[dict[str, Any]] = []
    measures = (("multiplies", pieces.multiplies), ("attention", pieces.attention), ("pieces", pieces.pieces))
    team = Distances(["steps", *((precision, name) for precision in precisions for name, _ in measures)])
    together = world.size == 1 and threads[-1] > 1  # several threads of one rank hand data from core to core

    def team_figures() -> None:
        """Measure with all threads what has not been measured with the cores as far from each other as they are now."""
        if not together:
            return
        torch.set_num_threads(threads[-1])
        with torch.enable_grad():
            for precision, (name, measure) in product(precisions, measures):
                team.take((precision, name), partial(measure, getattr(torch, DTYPES[precision])))
        team.take("steps", partial(programs.wider_steps, folder))
        torch.set_num_threads(threads[0])

    torch.set_num_threads(threads[0])
    team_figures()
    with torch.enable_grad():
        for precision in precisions:
            entry: dict[str, Any] = {"threads": threads[0], "ranks": world.size, "precision": precision}
            for name, measure in measures:
                dist.barrier()
                entry[name] = measure(getattr(torch, DTYPES[precision]))
            settings.append(entry)
    found: dict[str, Any] = {"settings": settings, "torch": torch.__version__}
    if world.size > 1:
        found["collectives"] = messages.messages()
    found["programs"] = programs.programs(world.size, folder / "programs", between=team_figures)
    if together:
        for handover_s, taken in team.complete(team_figures):
            for precision in precisions:
                figures = {name: taken[precision, name] for name, _ in measures}
                settings.append(
                    {
                        "threads": threads[-1],
                        "ranks": 1,
                        "precision": precision,
                        "handover_s": handover_s,
                        "steps": taken["steps"],
                        **figures,
                    }
                )
    if world.rank == 0:
        (folder / f"ranks-{world.size}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
