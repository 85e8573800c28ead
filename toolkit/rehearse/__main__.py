"""The interpreter of a rehearsal: puts the stand-ins in place before torch is imported, then forks
one process for each rank.

    python -m toolkit.rehearse FOLDER

FOLDER/jobs.json: {"device", "processes", "jobs": [{"config", "world", "rank", "steps", "hardware",
"hardware_file"}, …]}. Each job's answer is written to FOLDER/<number>.json; standard output carries
one line of JSON for each change of state.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from toolkit.rehearse import device as stand_ins


def main(folder: Path) -> None:
    """Run all jobs of a folder, several at a time."""
    order = json.loads((folder / "jobs.json").read_text())
    warnings.filterwarnings("ignore")
    kind = order["device"]
    if kind == "cuda":
        from toolkit.rehearse import guard

        stand_ins.load(guard.ensure())
    # what the ranks import, once for all of them
    from toolkit.rehearse.record import Told

    told = Told()
    from toolkit.hardware.catalogue import parse_hardware

    jobs = order["jobs"]
    first = parse_hardware(jobs[0]["hardware"], extra=_path(jobs[0])) if jobs[0].get("hardware") else None
    known: dict[str, Any] = {"memory": int(first.gpu.memory_gib * 2**30), "gpus": first.gpus_per_node} if first is not None else {}
    device = stand_ins.install(kind, told, **known)
    import torch

    torch.set_num_threads(1)
    import toolkit.rehearse.rank  # noqa: F401

    running: dict[int, int] = {}
    waiting = list(enumerate(jobs))
    while waiting or running:
        while waiting and len(running) < order["processes"]:
            number, job = waiting.pop(0)
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                _child(folder, number, job, device, told)
            running[child] = number
        ended, status = os.wait()
        number = running.pop(ended)
        if status != 0 and not (folder / f"{number}.json").exists():
            _write(folder, number, {"error": f"the process ended with status {status}", "rank": jobs[number]["rank"]})
        _say({"job": number, "done": True})


def _child(folder: Path, number: int, job: dict[str, Any], device: Any, told: Any) -> None:
    from toolkit.hardware.catalogue import parse_hardware
    from toolkit.rehearse.rank import rehearse

    try:
        os.environ.update(RANK=str(job["rank"]), WORLD_SIZE=str(job["world"]), LOCAL_RANK="0")
        hardware = parse_hardware(job["hardware"], extra=_path(job)) if job.get("hardware") else None
        found = rehearse(
            job["config"],
            world=job["world"],
            rank=job["rank"],
            steps=job["steps"],
            device=device,
            told=told,
            hardware=hardware,
            folder=folder / f"run-{number}",
            whole=job["whole"],
            progress=lambda phase, share: _say({"job": number, "phase": phase, "share": share}),
        )
    except BaseException as error:
        found = {"rank": job["rank"], "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    _write(folder, number, found)
    sys.stdout.flush()
    os._exit(0)


def _path(job: dict[str, Any]) -> Path | None:
    return Path(job["hardware_file"]) if job.get("hardware_file") else None


def _write(folder: Path, number: int, found: dict[str, Any]) -> None:
    partial = folder / f".{number}.json"
    partial.write_text(json.dumps(found))
    partial.replace(folder / f"{number}.json")


def _say(line: dict[str, Any]) -> None:
    os.write(1, (json.dumps(line) + "\n").encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
