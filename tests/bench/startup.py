"""Start-up of `toolkit train`: seconds from the command to the first step line, and where they go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PARTS = """
import json, sys, time, warnings, logging
warnings.filterwarnings("ignore"); logging.disable(logging.WARNING)
parts, last, cpu = {}, time.perf_counter(), time.process_time()
def lap(name):
    global last, cpu
    now, used = time.perf_counter(), time.process_time()
    parts[name] = (now - last, used - cpu); last, cpu = now, used
from pathlib import Path
from toolkit.config.load import load_config
config = load_config(Path(sys.argv[1]), sys.argv[2:]); lap("config: import pydantic, read the YAML")
import torch; lap("import torch")
import toolkit.model.cpu, deepspeed; lap("import deepspeed")
import megatron.core; from megatron.core.models.gpt import GPTModel; lap("import megatron-core (most of it torch's compiler)")
from toolkit.train import loop; from toolkit.train.resolve import resolve; from toolkit.train.world import World, connect; import toolkit.engine.zero, toolkit.model.build; lap("import toolkit")
world = World.from_environment()
resolved = resolve(config, world.size); lap("rules, opening the prepared data")
connect(world, resolved.layout, seed=config.run.seed); lap("process groups")
from toolkit.engine.zero import Engine
init = Engine.__init__
def timed(*args, **kwargs):
    lap("data sets, readers, model")
    init(*args, **kwargs); lap("DeepSpeed engine")
Engine.__init__ = timed
run = loop.Run(resolved, world); lap("run folder, metrics")
run._step(1); lap("first step")
print("PARTS " + json.dumps(parts), flush=True)
import os; os._exit(0)
"""


def command_to_first_step(config: Path, overrides: list[str], *, num_procs: int) -> float:
    """Seconds from starting `toolkit train` to its first step line."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "toolkit.cli", "train", str(config), "--num-procs", str(num_procs), *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment())
    assert process.stdout is not None
    seen: list[str] = []
    seconds = None
    for line in process.stdout:
        seen.append(line)
        if line.startswith("step") and seconds is None:
            seconds = time.perf_counter() - started
    if process.wait() or seconds is None:
        raise RuntimeError(f"toolkit train failed:\n{''.join(seen[-30:])}")
    return seconds


def parts(config: Path, overrides: list[str]) -> dict[str, tuple[float, float]]:
    """Name -> (seconds, CPU seconds) of each part of one rank's start-up, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", PARTS, str(config), *overrides], capture_output=True, text=True, env=_environment())
    for line in done.stdout.splitlines():
        if line.startswith("PARTS "):
            return {name: tuple(pair) for name, pair in json.loads(line.removeprefix("PARTS ")).items()}
    raise RuntimeError(f"start-up failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
