"""Checks of results: a CPU's losses and gradient norms on the GPU, in every way the engine can hold
the states.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from toolkit.checkpoint.manifest import discover
from toolkit.cluster.environment import gpu_count
from toolkit.cluster.launch import run_local
from toolkit.errors import ToolkitError
from toolkit.gpu_check.rows import PROCESSORS, Row, Skip, held, same_training, skipped
from toolkit.gpu_check.runs import Say, attempt, program, train, write_yaml
from toolkit.gpu_check.setting import Setting
from toolkit.runfolder.metrics import read_metrics
from toolkit.train.hooks import Step

Raw = dict[str, Any]
PRECISIONS = ("fp32", "bf16", "fp16")
RESUMED, KILLED, LAST = 4, 5, 8  # the step that is saved, the step after which the run is killed, the last one


def reference_runs(setting: Setting) -> dict[str, Raw]:
    """One run for each precision, from the same weights, with ZeRO-0: what every other run must give."""
    precisions = PRECISIONS[:2] if setting.quick else PRECISIONS
    return {p: setting.small(f"reference-{p}", _from_weights(setting) | {"train.precision": p}) for p in precisions}


def reference(setting: Setting, say: Say) -> None:
    """Draw the weights and train with them, on the CPU."""
    drawn = {"train.steps": 1, "optimizer.lr": 0.0, "checkpoint.every": 1, "checkpoint.async_save": False}
    train(setting.small("weights", drawn))
    for precision, raw in reference_runs(setting).items():
        records = train(raw)
        say(Row(name=f"{precision} on the CPU", verdict="note", measured=records[-1]["loss"], note=f"loss of step {records[-1]['step']}"))


def zero_runs(setting: Setting) -> dict[str, Raw]:
    """Each ZeRO stage, precision and overlap_comm, which stages 0 and 1 do without."""
    runs = {}
    for precision, stage, overlap in product(reference_runs(setting), range(4), (False, True)):
        if overlap and (stage < 2 or setting.quick):
            continue
        name = f"zero{stage}-{precision}" + ("-overlap" if overlap else "")
        keys = {"train.precision": precision, "zero.stage": stage, "zero.deepspeed.zero_optimization.overlap_comm": overlap}
        runs[name] = setting.small(name, _from_weights(setting) | keys)
    return runs


def zero(setting: Setting, say: Say) -> None:
    say(
        held(
            "TF32 is off",
            torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32,
            note="the fp32 bounds are for sums in fp32",
        )
    )
    _against_reference(setting, say, zero_runs(setting))


def offload_runs(setting: Setting) -> dict[str, Raw]:
    """Optimizer states and parameters on the CPU and on a disk."""
    ways: dict[str, dict[str, Any]] = {
        "zero2-optimizer-cpu": {"zero.stage": 2, "zero.offload_optimizer": "cpu"},
        "zero3-optimizer-cpu": {"zero.stage": 3, "zero.offload_optimizer": "cpu"},
        "zero3-both-cpu": {"zero.stage": 3, "zero.offload_optimizer": "cpu", "zero.offload_param": "cpu"},
        "zero3-param-cpu": {"zero.stage": 3, "zero.offload_param": "cpu"},
    }
    if not setting.quick:
        nvme = {"zero.stage": 3, "zero.offload_optimizer": "nvme", "zero.nvme_path": str(setting.folder / "nvme")}
        ways |= {"zero2-optimizer-cpu-bf16": ways["zero2-optimizer-cpu"] | {"train.precision": "bf16"}}
        ways |= {"zero3-both-cpu-bf16": ways["zero3-both-cpu"] | {"train.precision": "bf16"}}
        ways |= {"zero3-optimizer-nvme": nvme, "zero3-optimizer-nvme-bf16": nvme | {"train.precision": "bf16"}}
    return {name: setting.small(name, _from_weights(setting) | keys) for name, keys in ways.items()}


def offload(setting: Setting, say: Say) -> None:
    """Compile what DeepSpeed needs, each once and with a row of its own, then train with whatever
    is there.
    """
    runs, lacking = offload_runs(setting), dict[str, str]()
    for extension, device in (("cpu_adam", "cpu"), ("async_io", "nvme")):
        if device == "nvme" and setting.quick:
            continue
        row = _compiled(setting, extension)
        say(row)
        if row.verdict != "pass":
            lacking[extension] = row.note
    ready = {}
    for name, raw in runs.items():
        needs = {"async_io", "cpu_adam"} if raw["zero"].get("offload_optimizer") == "nvme" else {"cpu_adam"}
        missing = sorted(needs & lacking.keys()) if raw["zero"].get("offload_optimizer") else []
        if missing:
            say(skipped(name, f"{missing[0]} is not there"))
        else:
            ready[name] = raw
    _against_reference(setting, say, ready)


def _compiled(setting: Setting, extension: str) -> Row:
    """Whether DeepSpeed's extension loads, and how long that took; compiled in a process of its own."""
    started = time.monotonic()
    builder = {"cpu_adam": "CPUAdamBuilder", "async_io": "AsyncIOBuilder"}[extension]
    code = (
        "import toolkit.engine.zero\n"  # it says which accelerator there is
        "from toolkit.cluster.locks import check_extension_locks\n"
        f"check_extension_locks({{{extension!r}}})\n"
        f"from deepspeed.ops.op_builder import {builder}\n"
        f"{builder}().load(verbose=False)"
    )
    exit_code, output = program(setting, f"compile-{extension}", ["-c", code])
    seconds = f"{time.monotonic() - started:.0f} s"
    if exit_code == 0:
        return Row(name=f"DeepSpeed's {extension}", verdict="pass", measured=seconds)
    return Row(name=f"DeepSpeed's {extension}", verdict="fail", measured=seconds, note=_reason(output))


def _reason(output: str) -> str:
    """What a failed compilation says, in the words of the tool where it is one that is missing."""
    for text, reason in (
        ("ninja not being installed", "ninja is missing: install it (pip install ninja)"),
        ("libaio", "libaio's headers are missing: install libaio-dev"),
        ("c++: not found", "a C++ compiler is missing: install g++"),
        ("c++: No such file", "a C++ compiler is missing: install g++"),
        ("CUDA_HOME", "the CUDA toolkit (nvcc and its headers) is missing: install it and set CUDA_HOME"),
    ):
        if text in output:
            return reason
    lines = [line.strip() for line in output.splitlines() if "error" in line.lower()] or output.strip().splitlines() or ["it says nothing"]
    return lines[-1][:300]


def resume_runs(setting: Setting) -> dict[str, Raw]:
    """With dropout, so that the generators of the GPU must come back as they were."""
    keys = {
        "train.precision": "bf16",
        "train.steps": LAST,
        "model.dropout": 0.1,
        "zero.stage": 1,
        "checkpoint.every": RESUMED,
        "checkpoint.async_save": False,
        "checkpoint.resume": "auto",
    }
    return {name: setting.small(name, _from_weights(setting) | keys) for name in ("undisturbed", "killed", "again")}


def resume(setting: Setting, say: Say) -> None:
    """A run that kill -9 ends, started again, against one that nothing disturbs: the same losses
    and the same bits at the end.
    """
    runs = resume_runs(setting)
    torch.use_deterministic_algorithms(True, warn_only=True)
    whole = train(runs["undisturbed"])
    config = write_yaml(setting, runs["killed"])
    code = f"from toolkit.gpu_check.training import train_and_die; train_and_die({str(config)!r})"
    exit_code, _ = program(setting, "killed", ["-c", code])
    checkpoints = Path(runs["killed"]["run"]["dir"]) / "checkpoints"
    complete = [f.step for f in discover(checkpoints) if f.finished]
    say(
        held(
            "kill -9 after the checkpoint",
            exit_code == -signal.SIGKILL and complete == [RESUMED],
            measured=f"exit {exit_code}, saved {complete}",
        )
    )
    found = train(runs["killed"])
    say(same_training("losses and norms of the run that was resumed", found, whole, (0.0, 0.0)))
    folders = [Path(runs[name]["run"]["dir"]) / "checkpoints" for name in ("undisturbed", "killed")]
    differing, tensors = differing_tensors(*folders)
    say(
        held(
            "bits of the last checkpoint",
            tensors > 0 and not differing,
            measured=f"{len(differing)} of {tensors} tensors differ",
            note=", ".join(differing[:3]),
        )
    )
    torch.use_deterministic_algorithms(False)
    runs["again"]["checkpoint"]["every"] = 0
    again = same_training("the same run without deterministic kernels", train(runs["again"]), whole, (0.0, 0.0))
    say(Row(name=again.name, verdict="note", measured=again.measured, note="PyTorch may choose kernels whose sums have no fixed order"))


def train_and_die(config: str) -> None:
    """The process that is killed: by itself, in the step after which the test wants it gone."""

    def die(step: Step) -> None:
        if step.record.step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)

    from toolkit.config.load import load_config
    from toolkit.trainer import Trainer

    torch.use_deterministic_algorithms(True, warn_only=True)
    Trainer(load_config(Path(config)), on_step=die).fit()


def differing_tensors(one: Path, other: Path) -> tuple[list[str], int]:
    """Names of tensors whose bits differ in the newest checkpoints of two runs, and how many there are."""
    from safetensors import safe_open

    newest = [max((f for f in discover(folder) if f.finished), key=lambda f: f.step).path for folder in (one, other)]
    differing, count = [], 0
    for path in sorted(newest[0].glob("*.safetensors")):
        with safe_open(path, "pt") as a, safe_open(newest[1] / path.name, "pt") as b:
            for name in a.keys():  # noqa: SIM118  not a mapping
                count += 1
                left, right = (f.get_tensor(name).contiguous().reshape(-1).view(torch.uint8) for f in (a, b))
                if not torch.equal(left, right):
                    differing.append(name)
    return differing, count


def ranks_runs(setting: Setting) -> dict[str, Raw]:
    """Layouts of two ranks."""
    ways: dict[str, dict[str, Any]] = {
        "tp2-zero1": {"parallel.tp": 2, "parallel.sequence_parallel": True, "zero.stage": 1},
        "pp2-zero2": {"parallel.pp": 2, "zero.stage": 2},
        "dp2-zero3": {"zero.stage": 3, "zero.deepspeed.zero_optimization.overlap_comm": True},
    }
    if setting.quick:
        del ways["pp2-zero2"], ways["dp2-zero3"]
    return {name: setting.small(name, _from_weights(setting) | keys) for name, keys in ways.items()}


def ranks(setting: Setting, say: Say) -> None:
    """Two ranks with a GPU each, started as `toolkit train` starts them."""
    if setting.device == "cuda" and gpu_count() < 2:
        raise Skip("it needs two GPUs")
    wanted = read_metrics(setting.run("reference-fp32"))
    for name, raw in ranks_runs(setting).items():

        def measure(name: str = name, raw: Raw = raw) -> Row:
            exit_code = run_local(write_yaml(setting, raw), num_procs=2)
            if exit_code != 0:
                raise ToolkitError(f"{name} ended with exit code {exit_code}")
            return same_training(name, read_metrics(Path(raw["run"]["dir"])), wanted, PROCESSORS["fp32"])

        attempt(name, say, measure)


def te_runs(setting: Setting) -> dict[str, Raw]:
    """The same run with PyTorch's layers and with Transformer Engine's."""
    return {
        impl: setting.small(f"impl-{impl}", _from_weights(setting) | {"model.impl": impl, "train.precision": "bf16"})
        for impl in ("local", "te")
    }


def transformer_engine(setting: Setting, say: Say) -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        raise Skip("transformer_engine is not installed")
    runs = te_runs(setting)
    local = train(runs["local"])
    attempt("te against local", say, lambda: same_training("te against local", train(runs["te"]), local, PROCESSORS["bf16"]))


def _from_weights(setting: Setting) -> dict[str, Any]:
    return {"checkpoint.init_from": str(setting.weights)}


def _against_reference(setting: Setting, say: Say, runs: dict[str, Raw]) -> None:
    for name, raw in runs.items():
        precision = raw["train"]["precision"]
        wanted = read_metrics(setting.run(f"reference-{precision}"))

        def measure(name: str = name, raw: Raw = raw, wanted: Any = wanted, precision: str = precision) -> Row:
            return same_training(name, train(raw), wanted, PROCESSORS[precision])

        attempt(name, say, measure)
