"""A real run on CPU under the same recorder as a rehearsal: what the pool's workers run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

MOST = 20  # steps, of which two must not be skipped


def measure(argument: dict[str, Any]) -> dict[str, Any]:
    """The second step that one rank is not made to skip: parts, peak and messages, from tensors
    that hold data and a gloo that sends.
    """
    import torch
    import torch.distributed as dist

    from toolkit.config.load import parse_config
    from toolkit.parallel.layout import Layout
    from toolkit.rehearse.program import Play
    from toolkit.rehearse.record import Recorder
    from toolkit.train.world import World, connect

    config, rank, size = parse_config(argument["config"]), dist.get_rank(), dist.get_world_size()
    layout = Layout.of(config, size)
    connect(World(rank, size, 0), layout, seed=config.run.seed)
    recorder = Recorder("cpu", rank=rank)
    with tempfile.TemporaryDirectory() as folder, recorder, recorder.wire.written(), torch.autograd.set_multithreading_enabled(False):
        play = Play(config, layout, rank, recorder, folder=Path(folder), steps=MOST)
        play.build()
        stepped = 0
        for _ in range(MOST):
            meter = play.step()
            stepped += not play.engine.optimizer.overflow  # fp16 skips steps until its loss scale suits
            if stepped == 2:
                break
        assert stepped == 2
        found = recorder.step
        play.close()
    groups = list(recorder.wire.groups)
    return {
        "parts": dict(meter.measured.parts),
        "peak": found.peak.nbytes,
        "at": [found.peak.phase, found.peak.module, found.peak.operator],
        "messages": [[m.operation, list(groups[m.group]), m.nbytes, m.dtype, m.peer] for m in found.messages],
    }
