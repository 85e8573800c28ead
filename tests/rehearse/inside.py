"""Code of the tests within the stand-ins for a GPU, in an interpreter of its own: python -m
tests.rehearse.inside MODULE:FUNCTION

run_inside("tests.rehearse.test_x:function", argument) calls function(argument) there and returns
what it returned, through JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ANSWER = "the answer: "


def run_inside(function: str, argument: Any = None, *, timeout_s: float = 900.0) -> Any:
    """What a function returns where torch.cuda answers and tensors of a GPU hold no data."""
    command = [sys.executable, "-m", "tests.rehearse.inside", function]
    done = subprocess.run(command, input=json.dumps(argument), capture_output=True, text=True, timeout=timeout_s, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    assert done.returncode == 0 and answers, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(answers[-1].removeprefix(ANSWER))


def main(function: str) -> None:
    warnings.filterwarnings("ignore")
    from toolkit.rehearse import device, guard

    device.load(guard.ensure())
    from toolkit.rehearse.record import Told

    told = Told()
    played = device.install("cuda", told)
    import torch

    torch.set_num_threads(1)
    module, name = function.split(":")
    PLAYED["device"], PLAYED["told"] = played, told
    answer = getattr(importlib.import_module(module), name)(json.loads(sys.stdin.read()))
    sys.stdout.write(f"{ANSWER}{json.dumps(answer)}\n")
    sys.stdout.flush()
    os._exit(0)  # no process group is there to be closed


PLAYED: dict[str, Any] = {}


@contextmanager
def played(raw: dict[str, Any], *, world: int, rank: int = 0, **more: Any) -> Iterator[Any]:
    """A rank of a run with its model and engine built, and its recorder active; within run_inside alone."""
    import torch

    from tests.rehearse import inside
    from toolkit.config.load import parse_config
    from toolkit.engine import zero
    from toolkit.parallel.layout import Layout
    from toolkit.rehearse import device as stand_ins
    from toolkit.rehearse.program import Play
    from toolkit.rehearse.record import Recorder
    from toolkit.train.world import World, connect

    config = parse_config(raw)
    layout = Layout.of(config, world)
    device = inside.PLAYED["device"]
    recorder = Recorder("cuda", rank=rank)
    recorder.device, inside.PLAYED["told"].recorder = device, recorder
    stand_ins.install_optimizer(zero.deepspeed)
    stand_ins.open_world(rank, world)
    connect(World(rank, world, 0), layout, seed=config.run.seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        device.tensors(),
        recorder,
        recorder.wire.written(),
        torch.autograd.set_multithreading_enabled(False),
    ):
        play = Play(config, layout, rank, recorder, folder=Path(folder) / "run", **more)
        play.build()
        yield play


if __name__ == "__main__":
    sys.modules["tests.rehearse.inside"] = sys.modules["__main__"]  # one module, whatever name asks for it
    main(sys.argv[1])
