"""Checks of what was predicted: where the host waits in a step, and the speed and memory of a model
of a real size.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from toolkit.config.load import parse_config
from toolkit.errors import ToolkitError
from toolkit.gpu_check.rehearsed import rehearsals, rehearse_all
from toolkit.gpu_check.rows import Row, Skip, beside, held, skipped, within
from toolkit.gpu_check.runs import Say, train
from toolkit.gpu_check.setting import Setting
from toolkit.hardware.catalogue import Hardware, gpu_of_device, parse_hardware
from toolkit.plan.show import estimate_json
from toolkit.rehearse.place import here
from toolkit.runfolder.metrics import after_warm_up
from toolkit.train.hooks import Step

Raw = dict[str, Any]
GIB = 2**30
REHEARSED = "h100-80gb:1x1"  # memory and waits are those of any GPU, the time of a step is of this one
WATCHED = range(3, 6)  # steps in which the host's waits are counted: the first ones allocate and choose kernels
MEMORY, SPEED = 0.10, 0.5  # shares by which a measured peak and step time may differ from their predictions


def hardware_of(setting: Setting) -> Hardware | None:
    """This machine's GPU as the catalogue has it, alone; None for one that it lacks."""
    if setting.device == "cpu":
        return parse_hardware("cpu:1")
    gpu = gpu_of_device(torch.cuda.get_device_name())
    return replace(parse_hardware(gpu.name), gpus_per_node=1, nodes=1) if gpu is not None else None


def rehearsal(setting: Setting, say: Say) -> None:
    """Rehearse on the CPU what is measured later, unless another machine has done so."""
    if setting.rehearsed is not None:
        raise Skip(f"{setting.rehearsed.name} has it")
    try:
        found = rehearse_all(sync_runs(setting) | llama_runs(setting), hardware=REHEARSED)
    except ToolkitError as error:  # a compiler that is missing, or a PyTorch that already has a GPU's device
        raise Skip(str(error)) from None
    (setting.folder / "rehearsed.json").write_text(json.dumps(found))
    for name, one in found.items():
        wrong = one.get("error") or one.get("refused")
        peak = None if wrong else f"{one['allocated'] / GIB:.2f} GiB"
        say(Row(name=name, verdict="fail" if wrong else "note", measured=peak, note=wrong or ""))


def sync_runs(setting: Setting) -> dict[str, Raw]:
    stages = (1, 2, 3)
    return {f"waits-zero{n}": setting.small(f"waits-zero{n}", {"zero.stage": n, "train.precision": "bf16"}) for n in stages}


class Waits:
    """Counts what torch.cuda.set_sync_debug_mode warns of, by the line of the program that made the
    host wait.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Within this context every warning of a synchronisation counts; other warnings go where
        they went before.
        """
        before = warnings.showwarning

        def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any, **more: Any) -> None:
            if "synchronizing CUDA operation" in str(message):
                self.places[here() or "within autograd"] += 1
            else:
                before(message, category, filename, lineno, *rest, **more)

        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
            warnings.showwarning = show
            try:
                yield
            finally:
                warnings.showwarning = before


def waits(setting: Setting, say: Say) -> None:
    """Where the host waits for the device within a step, against the rehearsal's list of places."""
    if setting.device == "cpu":
        raise Skip("a CPU has no queue to wait for")
    for name, raw in sync_runs(setting).items():
        foreseen = {place.split(":")[0] for _, place, _ in (rehearsals(setting, name) or {}).get("syncs", [])}
        seen = Waits()

        def watch(step: Step) -> None:
            torch.cuda.set_sync_debug_mode("warn" if step.record.step + 1 in WATCHED else "default")

        # without threads of its own, autograd runs where Python can tell the line
        with seen.counted(), torch.autograd.set_multithreading_enabled(False):
            train(raw, on_step=watch)
        torch.cuda.set_sync_debug_mode("default")
        for row in wait_rows(name, seen.places, foreseen, known=rehearsals(setting, name) is not None):
            say(row)


def wait_rows(name: str, places: Mapping[str, int], foreseen: set[str], *, known: bool) -> list[Row]:
    """One row for each place, and one for what was foreseen and not seen. foreseen: files, as last
    two parts of their path.
    """
    rows = []
    for place, count in sorted(places.items(), key=lambda item: -item[1]):
        # the loop reads the loss once a step, after the step; a rehearsal ends before it
        own = place.startswith(("train/", "trainer.py", "profile/"))
        fine = own or place.split(":")[0] in foreseen
        note = (
            "the loop around the step" if own else "as rehearsed" if fine else "not in the rehearsal" if known else "there is no rehearsal"
        )
        each = f"{count / len(WATCHED):.3g} a step"
        rows.append(
            Row(name=f"{name}: {place}", verdict="note" if own or not known else "pass" if fine else "fail", measured=each, note=note)
        )
    unseen = foreseen - {place.split(":")[0] for place in places}
    if unseen:
        rows.append(Row(name=f"{name}: foreseen alone", verdict="note", measured=", ".join(sorted(unseen))))
    return rows or [Row(name=name, verdict="pass", measured="no waits")]


def llama_runs(setting: Setting) -> dict[str, Raw]:
    """From the fastest to the one that needs least memory; the first that fits is measured."""
    ways: dict[str, dict[str, Any]] = {
        "llama-1b": {},
        "llama-1b-micro1": {"train.micro_batch_size": 1},
        "llama-1b-recompute": {"train.micro_batch_size": 1, "train.recompute": "full"},
    }
    return {name: setting.llama_1b(name, keys) for name, keys in ways.items()}


def llama(setting: Setting, say: Say) -> None:
    """Tokens a second, MFU and peak memory, beside what `toolkit estimate` and `toolkit rehearse` say."""
    hardware = hardware_of(setting)
    runs = llama_runs(setting)
    estimates = {n: estimate_json(parse_config(raw), hardware) for n, raw in runs.items()} if hardware is not None else {}
    name = next((n for n in runs if hardware is None or estimates[n]["fits"]), None)
    if name is None:
        raise Skip(f"no Llama of 1B fits {hardware}")
    reserved: list[float] = []

    def watch(step: Step) -> None:
        if setting.device == "cuda":
            reserved.append(torch.cuda.max_memory_reserved() / GIB)

    records = train(runs[name], on_step=watch)
    steady = after_warm_up(records)
    step_s, peak = median(r["step_s"] for r in steady), max(r["memory_gib"] for r in steady)
    say(Row(name="tokens a second", verdict="note", measured=median(r["tokens_per_s"] for r in steady), note=name))
    say(
        Row(
            name="MFU",
            verdict="note",
            measured=median(r["mfu"] for r in steady) if steady[0]["mfu"] else "the peak of this device is not known",
        )
    )
    losses = [r["loss"] for r in records]
    say(held("the loss falls", losses[-1] < losses[0], measured=losses[-1], expected=losses[0]))
    figures = {"step_s": step_s, "peak": peak, "reserved": max(reserved, default=None)}
    for row in prediction_rows(estimates.get(name), rehearsals(setting, name), **figures, bound=not setting.quick):
        say(row)


def prediction_rows(
    predicted: dict[str, Any] | None,
    foreseen: dict[str, Any] | None,
    *,
    step_s: float,
    peak: float,
    reserved: float | None,
    bound: bool,
) -> list[Row]:
    """Measured figures beside the estimate's and the rehearsal's. bound: whether they are held to
    them; reserved: GiB, None on a CPU, where the peak is that of the whole process and is not
    compared.
    """
    rows = []
    if predicted is None:
        rows.append(skipped("estimate", "the catalogue lacks this GPU"))
    else:
        rows.append(_beside("estimate: step, s", step_s, predicted["step_s"], SPEED if bound else None))
        if reserved is not None:
            rows.append(_beside("estimate: peak allocated, GiB", peak, predicted["peak_allocated_gib"], MEMORY if bound else None))
    if foreseen is None:
        return [*rows, skipped("rehearsal", "there is none")]
    rows.append(beside("rehearsal: step, s", step_s, foreseen["step_s"], note=f"rehearsed for {foreseen['hardware']}"))
    if reserved is not None:
        rows.append(_beside("rehearsal: peak allocated, GiB", peak, foreseen["allocated"] / GIB, MEMORY if bound else None))
        rows.append(beside("rehearsal: peak reserved, GiB", reserved, foreseen["reserved"] / GIB))
    return rows


def _beside(name: str, measured: float, expected: float, share: float | None) -> Row:
    return beside(name, measured, expected) if share is None else within(name, measured, expected, share)
