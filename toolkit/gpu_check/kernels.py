"""Which kernels run: attention's, and with megatron-core's fusions on."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from toolkit.errors import ToolkitError
from toolkit.gpu_check.rows import PROCESSORS, Row, held, same_training
from toolkit.gpu_check.runs import Say, attempt, train
from toolkit.gpu_check.setting import Setting
from toolkit.runfolder.metrics import after_warm_up
from toolkit.train.hooks import Step

Raw = dict[str, Any]
FUSED = ("flash", "efficient", "cudnn", "cutlass", "fmha")
ATTENTION = re.compile(r"flash|fmha|attention|sdpa|cudnn.*(sdp|mha)", re.IGNORECASE)


def attention_runs(setting: Setting) -> dict[str, Raw]:
    runs = {p: setting.medium(f"attention-{p}", {"train.precision": p, "train.steps": 3}) for p in ("bf16", "fp32")}
    if setting.device == "cuda":  # PyTorch has no fused kernel with dropout for a CPU
        runs["bf16 with dropout"] = setting.medium("attention-dropout", {"model.dropout": 0.1, "train.steps": 3, "train.precision": "bf16"})
    return runs


def attention(setting: Setting, say: Say) -> None:
    """Which kernel attention runs in: any fused one is fine, a [s, s] matrix of scores is not."""
    for name, raw in attention_runs(setting).items():

        def measure(name: str = name, raw: Raw = raw) -> Row:
            operators, kernels = _profiled(raw)
            fused = any(word in operator for operator in operators for word in FUSED)
            seen = ", ".join(sorted(o.removeprefix("aten::") for o in operators)) or "none"
            return held(name, fused, measured=seen, expected="a fused kernel", note=", ".join(k[:60] for k in kernels[:2]))

        attempt(name, say, measure)


def _profiled(raw: Raw) -> tuple[list[str], list[str]]:
    """Attention's operators of PyTorch in the last step of a run, and the GPU's kernels, the
    longest first.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    profiler = torch.profiler.profile(activities=activities)
    last = raw["train"]["steps"]

    def watch(step: Step) -> None:
        if step.record.step == last - 1:
            profiler.start()
        elif step.record.step == last:
            profiler.stop()

    train(raw, on_step=watch)
    events = profiler.key_averages()
    operators = [e.key for e in events if e.key.startswith("aten::_scaled_dot_product") and "backward" not in e.key]
    on_device = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU and ATTENTION.search(e.key)]
    return operators, [e.key for e in sorted(on_device, key=lambda e: -e.self_device_time_total)]


# switches of megatron-core's configuration that the toolkit leaves off and that need no other package
FUSIONS: dict[str, dict[str, Any]] = {
    "bias_activation_fusion": {"bias_activation_fusion": True},
    "bias_dropout_fusion": {"bias_dropout_fusion": True},
    "cross_entropy_loss_fusion": {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"},
}


def fusion_runs(setting: Setting) -> dict[str, Raw]:
    # on a CPU the compiler takes a minute for some of them
    names = ["bias_dropout_fusion"] if setting.quick else [*FUSIONS, "compile"]
    keys = {"zero.stage": 1}
    return {n: setting.medium(f"fusion-{n}", keys | ({"model.compile": True} if n == "compile" else {})) for n in ("off", *names)}


def fusions(setting: Setting, say: Say) -> None:
    """Time of a step and losses with each fusion, beside the run without any."""
    runs = fusion_runs(setting)
    plain = train(runs.pop("off"))
    seconds = median(r["step_s"] for r in after_warm_up(plain))
    say(Row(name="off: step, s", verdict="note", measured=seconds))
    for name, raw in runs.items():

        def measure(name: str = name, raw: Raw = raw) -> Row:
            started = time.perf_counter()
            with fused(FUSIONS.get(name, {})):
                records = train(raw)
            took = median(r["step_s"] for r in after_warm_up(records))
            note = f"{took:.4g} s a step, {took / seconds:.3f} of the plain one; {time.perf_counter() - started:.0f} s in all"
            return same_training(name, records, plain, PROCESSORS["bf16"], note=note)

        attempt(name, say, measure)


@contextmanager
def fused(switches: Mapping[str, Any]) -> Iterator[None]:
    """Within this context models are built with these values in megatron-core's configuration."""
    from toolkit.model import build

    made = build.transformer_config

    def changed(*arguments: Any, **more: Any) -> Any:
        settings = made(*arguments, **more)
        for key, value in switches.items():
            if not hasattr(settings, key):
                raise ToolkitError(f"megatron-core has no {key} here")
            setattr(settings, key, value)
        return settings

    build.transformer_config = changed
    try:
        yield
    finally:
        build.transformer_config = made
