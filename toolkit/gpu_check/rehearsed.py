"""What a rehearsal says of the runs that a check measures: made here on the CPU, or read from a
file that another machine has made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from toolkit.config.load import parse_config
from toolkit.errors import ToolkitError
from toolkit.gpu_check.setting import Setting
from toolkit.hardware.catalogue import parse_hardware
from toolkit.parallel.layout import Layout
from toolkit.rehearse import match, play
from toolkit.rehearse.session import Job, prepare, refuse_errors, run

Raw = dict[str, Any]


def rehearse_all(runs: Mapping[str, Raw], *, hardware: str) -> dict[str, Any]:
    """What a rehearsal as CUDA says of each run; a run that cannot be rehearsed says why instead."""
    jobs, found = {}, dict[str, Any]()
    cluster = parse_hardware(hardware)
    for name, raw in runs.items():
        try:
            config, _ = prepare(parse_config(raw), cluster)
            jobs[name] = Job(config=config, world=cluster.count, rank=0, hardware=hardware)
        except ToolkitError as error:
            found[name] = {"refused": str(error)}
    for name, answer in zip(jobs, run(list(jobs.values())) if jobs else [], strict=True):
        try:
            refuse_errors([answer])
        except ToolkitError as error:
            found[name] = {"error": str(error)}
            continue
        played = play.play(match.cast(Layout(), [answer]))
        found[name] = {
            "allocated": answer["allocated"],
            "reserved": answer["peak_reserved"],
            "syncs": answer["step"]["syncs"],
            "step_s": played.step_s,
            "hardware": hardware,
        }
    return found


def rehearsals(setting: Setting, name: str) -> dict[str, Any] | None:
    """What the rehearsal of a run has said, from --rehearsed or from the check before; None where
    there is none.
    """
    path = setting.rehearsed or setting.folder / "rehearsed.json"
    try:
        found = json.loads(path.read_text()).get(name)
    except (OSError, ValueError):
        return None
    return dict(found) if found and "allocated" in found else None
