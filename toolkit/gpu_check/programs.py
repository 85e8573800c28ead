"""Checks of programs as a user starts them: one whose memory ends, and `toolkit profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from toolkit.config.load import parse_config
from toolkit.errors import OutOfMemory
from toolkit.gpu_check.rows import Row, held, within
from toolkit.gpu_check.runs import Say, program, write_yaml
from toolkit.gpu_check.setting import Setting
from toolkit.plan.show import estimate_json
from toolkit.profile.predict import hardware_here
from toolkit.profile.show import FLAGS, worst_of_stage
from toolkit.runfolder.profile import read_profile

Raw = dict[str, Any]
MIB = 2**20
PARTS = ("parameters", "gradients", "optimizer", "zero buffers", "activations", "logits")
PREDICTED = 0.02  # what docs/memory.md promises of each part


def oom_runs(setting: Setting) -> dict[str, Raw]:
    keys: dict[str, Any] = {"zero.stage": 1, "train.global_batch_size": 8, "train.micro_batch_size": 8}
    if setting.quick:  # tensors of which the first is not lost in what libraries take beside them
        keys |= {"train.seq_length": 1024, "model.max_position_embeddings": 1024, "model.vocab_size": 8192}
    return {"out-of-memory": setting.medium("out-of-memory", keys)}


def oom(setting: Setting, say: Say) -> None:
    """A run that gets half the memory it needs ends with our message, and says what to set."""
    (raw,) = oom_runs(setting).values()
    gpu = torch.cuda.get_device_name() if setting.device == "cuda" else None
    needed = estimate_json(parse_config(raw), hardware_here(gpu=gpu, ranks=1))["peak_allocated_gib"]
    limit = needed / 2
    exit_code, output = program(
        setting, "out-of-memory", ["-m", "toolkit.profile", write_yaml(setting, raw), f"--memory-limit={limit:.4f}"]
    )
    message = next((line for line in output.splitlines() if line.startswith("error:")), "")
    say(Row(name="memory", verdict="note", measured=f"{limit:.3f} GiB", note="half of what the estimate asks for"))
    say(held("exit code", exit_code == OutOfMemory.exit_code, measured=exit_code, expected=OutOfMemory.exit_code))
    fine = "ran out of memory for" in message and "Traceback" not in output
    say(held("one message and no traceback", fine, note=message[:300] or output[-300:]))


def profile_runs(setting: Setting) -> dict[str, Raw]:
    return {"profiled": setting.medium("profiled", {"zero.stage": 2})}


def profile(setting: Setting, say: Say) -> None:
    """`toolkit profile` through its launcher: each part of memory against the estimate, and the
    files it promises.
    """
    (raw,) = profile_runs(setting).values()
    arguments: list[str | Path] = ["-m", "toolkit", "profile", write_yaml(setting, raw), "--num-procs=1", "--steps=2"]
    exit_code, output = program(setting, "profile", arguments)
    say(held("exit code", exit_code == 0, measured=exit_code, expected=0, note="" if exit_code == 0 else output[-300:]))
    run = Path(raw["run"]["dir"])
    found = read_profile(run)
    if found is None:
        return
    (rank,) = worst_of_stage(found)
    for part in PARTS:
        measured, expected = rank["memory"].get(part, 0), rank["predicted"].get(part, 0)
        if max(measured, expected) > FLAGS:
            say(within(f"{part}, MiB", measured / MIB, expected / MIB, PREDICTED))
    say(Row(name="peak, MiB", verdict="note", measured=rank["memory"]["peak"] / MIB, expected=rank["predicted"]["peak"] / MIB))
    for part, seconds in rank["seconds"].items():
        say(Row(name=f"{part}, s", verdict="note", measured=seconds))
    for kind in ("trace", "snapshot") if setting.device == "cuda" else ("trace",):
        path = run / str(rank.get(kind))
        say(held(f"the {kind} is there", path.is_file() and path.stat().st_size > 0))
