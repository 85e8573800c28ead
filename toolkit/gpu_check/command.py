"""The command line of a GPU check.

Exit code 0: all checks that ran are as expected; 1: one failed, or the budget ended before all had
run; 2: there is no GPU, or something is missing that all checks need.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from toolkit import __version__
from toolkit.cluster.environment import gpu_count
from toolkit.errors import ConfigError, MachineError
from toolkit.gpu_check import page
from toolkit.gpu_check.checks import CHECKS, Check
from toolkit.gpu_check.session import WORKER, Outcome, run_checks
from toolkit.gpu_check.setting import Setting, write_text

RED = 1
RESULTS = Path("docs/results")


def main(arguments: list[str], *, worker: str = WORKER) -> int:
    """Run the checks; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m toolkit.gpu_check", description="Check on a GPU what nothing else can show.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same list, as far as it makes sense there")
    parser.add_argument("--quick", action="store_true", help="small models throughout")
    parser.add_argument("--minutes", type=float, default=14.0, help="no check starts or goes on after this")
    parser.add_argument("--only", help="names of checks, separated by commas; those that they build on are added")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    parser.add_argument("--rehearsed", type=Path, help="a file of --rehearse: nothing is rehearsed on this machine")
    parser.add_argument("--rehearse", type=Path, metavar="FILE", help="rehearse the runs of the checks instead, and write what is foreseen")
    parser.add_argument("--hardware", default="h100-80gb:1x1", help="of --rehearse")
    parser.add_argument("--keep", type=Path, help="folder for runs and logs, which is kept")
    options = parser.parse_args(arguments)
    _check_packages()
    if options.rehearse is not None:
        return _rehearse(options.rehearse, options.hardware, quick=options.quick)
    if options.device == "cuda" and gpu_count() == 0:
        raise MachineError(
            "there is no GPU here that this PyTorch can use",
            why="the checks are of what a GPU does",
            fix="Look at nvidia-smi and CUDA_VISIBLE_DEVICES; --device cpu --quick runs the list on the CPU.",
        )
    chosen = choose(options.only)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-check-")))
        if options.keep is not None and folder.exists():
            shutil.rmtree(folder / "runs", ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "text")
        # a file of the real sizes says nothing of small ones
        rehearsed = options.rehearsed.resolve() if options.rehearsed and not options.quick else None
        setting = Setting(folder=folder.resolve(), device=options.device, quick=options.quick, rehearsed=rehearsed)
        report = {
            "format": page.FORMAT,
            "device": _device_name() if options.device == "cuda" else "cpu",
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(["python -m toolkit.gpu_check", *arguments]),
            "version": __version__,
            "minutes": options.minutes,
            "seconds": 0.0,
            "planned": [check.name for check in chosen],
            "checks": [],
        }

        def finished(outcome: Outcome) -> None:
            report["checks"].append(outcome.as_json())  # type: ignore[attr-defined]
            report["seconds"] = time.monotonic() - started
            report["page"] = str(page.write(options.out, report))
            sys.stdout.write(f"{outcome.verdict}, {outcome.seconds:.0f} s {outcome.note}\n")
            sys.stdout.flush()

        def begun(check: Check) -> None:
            sys.stdout.write(f"{check.title} … ")
            sys.stdout.flush()

        outcomes = run_checks(chosen, setting, minutes=options.minutes, finished=finished, started=begun, worker=worker)
    sys.stdout.write(f"written to {report['page']}\n")
    red = any(o.verdict == "fail" or o.state == "not started" for o in outcomes)
    return RED if red else 0


def choose(only: str | None) -> list[Check]:
    """The checks that --only names, in the list's order, with those that they build on."""
    if only is None:
        return list(CHECKS)
    known = {check.name: check for check in CHECKS}
    wanted = set(only.split(","))
    if unknown := wanted - known.keys():
        raise ConfigError(f"--only names {', '.join(sorted(unknown))}", why="there is no such check", fix=f"There are {', '.join(known)}.")
    needed = {name for check in wanted for name in known[check].needs}
    return [check for check in CHECKS if check.name in wanted | needed]


def _check_packages() -> None:
    """Raise MachineError for libraries without which no check runs."""
    missing = [name for name in ("torch", "deepspeed", "megatron.core", "safetensors") if not _installed(name)]
    if missing:
        raise MachineError(
            f"{', '.join(missing)} cannot be found by this Python ({sys.executable})",
            fix="Where there is a registry: pip install -e . Else make gpu-wheels there, and make gpu-check WHEELS=FOLDER here.",
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that a name lies in
        return False


def _rehearse(path: Path, hardware: str, *, quick: bool) -> int:
    """Rehearse every run of the list as CUDA; 1 where one fails that can be rehearsed."""
    from toolkit.gpu_check.rehearsed import rehearse_all

    setting = Setting(folder=Path("/rehearsed"), quick=quick)
    runs = {name: raw for check in CHECKS for name, raw in check.rehearsed(setting).items()}
    found = rehearse_all(runs, hardware=hardware)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    for name, one in found.items():
        peak = f"{one['allocated'] / 2**30:.2f} GiB" if "allocated" in one else one.get("error") or f"not rehearsed: {one['refused']}"
        sys.stdout.write(f"{name}: {peak}\n")
    return RED if any("error" in one for one in found.values()) else 0


def _device_name() -> str:
    """The GPU's own name, from the driver's tool or from torch."""
    if shutil.which("nvidia-smi") is not None:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.splitlines()[0].strip()
    code = "import torch; print(torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False)
    return (done.stdout.splitlines() or ["gpu"])[-1].strip()
