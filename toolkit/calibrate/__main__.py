"""`python -m toolkit.calibrate FOLDER THREADS PRECISION…`: one rank that measures; rank 0 writes FOLDER/ranks-N.json.

It is started by toolkit.calibrate.session, with RANK and WORLD_SIZE in its environment.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def main(arguments: list[str]) -> int:
    """Measure all settings of this number of ranks, one after the other."""
    folder, threads, precisions = Path(arguments[0]), [int(n) for n in arguments[1].split(",")], arguments[2:]
    import torch
    import torch.distributed as dist

    from toolkit.calibrate import messages, pieces, programs
    from toolkit.parallel.layout import Layout
    from toolkit.train.world import World, connect

    logging.disable(logging.WARNING)
    world = World.from_environment()
    connect(world, Layout(dp=world.size), seed=1, meeting=str(folder / f"meeting-{world.size}"))
    torch.manual_seed(1)
    settings: list[dict[str, Any]] = []
    with torch.enable_grad():
        for count in threads:
            torch.set_num_threads(count)
            for precision in precisions:
                dtype = getattr(torch, DTYPES[precision])
                entry: dict[str, Any] = {"threads": count, "ranks": world.size, "precision": precision}
                for name, measure in (("multiplies", pieces.multiplies), ("attention", pieces.attention), ("pieces", pieces.pieces)):
                    dist.barrier()
                    entry[name] = measure(dtype)
                settings.append(entry)
    found: dict[str, Any] = {"settings": settings, "torch": torch.__version__}
    if world.size > 1:
        found["collectives"] = messages.messages()
    found["programs"] = programs.programs(world.size, folder / "programs")
    if world.rank == 0:
        (folder / f"ranks-{world.size}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
