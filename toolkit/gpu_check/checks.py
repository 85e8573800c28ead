"""The list of checks, from cheap to dear: pure. docs/gpu-check.md says what each is for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from toolkit.gpu_check.setting import Setting

HERE = "toolkit.gpu_check"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check. function: MODULE:NAME, called with the setting and a function that takes a row.

    seconds: its deadline; alone: in a process that has done nothing else; on_cpu: with the GPU
    hidden; environ: of its process;
    runs: MODULE:NAME of what gives the YAML of each of its runs, for a rehearsal of the check;
    needs: checks that must have run before it.
    """

    name: str
    title: str
    function: str
    seconds: float
    alone: bool = False
    on_cpu: bool = False
    environ: dict[str, str] = field(default_factory=dict)
    runs: str | None = None
    needs: tuple[str, ...] = ()

    def run(self, setting: Setting, say: Callable[[Any], None]) -> None:
        _find(self.function)(setting, say)

    def rehearsed(self, setting: Setting) -> dict[str, dict[str, Any]]:
        """The YAML of the runs of this check by name; none for a check that trains nothing."""
        return dict(_find(self.runs)(setting)) if self.runs else {}


def _find(name: str) -> Any:
    module, function = name.split(":")
    return getattr(importlib.import_module(f"{HERE}.{module}"), function)


CHECKS = (
    Check(name="versions", title="Versions and the machine", function="machine:versions", seconds=60),
    Check(name="reference", title="The CPU's losses", function="training:reference", seconds=120, on_cpu=True),
    Check(
        name="zero",
        title="Each ZeRO stage, precision and overlap_comm against the CPU",
        function="training:zero",
        seconds=150,
        runs="training:zero_runs",
        needs=("reference",),
    ),
    Check(name="collectives", title="Collectives in a group of one", function="machine:collectives", seconds=60, alone=True),
    Check(
        name="attention", title="The kernel that attention runs in", function="kernels:attention", seconds=90, runs="kernels:attention_runs"
    ),
    Check(name="spans", title="Attention over documents and parts of a sequence", function="spans:spans", seconds=60),
    Check(name="rehearsal", title="Rehearsal of what is measured", function="measure:rehearsal", seconds=150, on_cpu=True, alone=True),
    Check(name="waits", title="Waits of the host within a step", function="measure:waits", seconds=60, runs="measure:sync_runs"),
    Check(
        name="resume",
        title="Save, kill -9, resume",
        function="training:resume",
        seconds=120,
        alone=True,
        environ={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},  # cuBLAS sums in a fixed order with it alone
        runs="training:resume_runs",
        needs=("reference",),
    ),
    Check(name="oom", title="A run whose memory ends", function="programs:oom", seconds=90, runs="programs:oom_runs"),
    Check(name="profile", title="toolkit profile", function="programs:profile", seconds=120, runs="programs:profile_runs"),
    Check(
        name="llama-1b",
        title="Llama 3.2 1B at 4,096 tokens against its predictions",
        function="measure:llama",
        seconds=180,
        alone=True,
        runs="measure:llama_runs",
    ),
    Check(name="fusions", title="Fusions on and off", function="kernels:fusions", seconds=150, alone=True, runs="kernels:fusion_runs"),
    Check(
        name="transformer-engine",
        title="Transformer Engine against PyTorch's layers",
        function="training:transformer_engine",
        seconds=90,
        alone=True,
        runs="training:te_runs",
        needs=("reference",),
    ),
    Check(name="ranks", title="Two ranks", function="training:ranks", seconds=180, needs=("reference",)),
    Check(
        name="offload",
        title="Offload to the CPU and to a disk",
        function="training:offload",
        seconds=300,
        alone=True,
        runs="training:offload_runs",
        needs=("reference",),
    ),
)
