"""`toolkit tune --rehearse`: play the best plans through `toolkit rehearse`, and drop those that would not run."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolkit.config.explain import validate
from toolkit.config.load import dump_config
from toolkit.config.schema import RunConfig
from toolkit.cost.memory import GIB
from toolkit.errors import MachineError
from toolkit.plan.reasons import layout_words
from toolkit.plan.search import Plan
from toolkit.plan.space import spec
from toolkit.plan.tune import Answer, Question, planned

log = logging.getLogger("toolkit.tune")

Status = Literal["fits", "does not fit", "ranks disagree", "failed", "not rehearsed"]
REFUSED = 2  # exit code of `toolkit rehearse` where it cannot play what it is asked for


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """How a plan's rehearsal went. gib: what the worst rank's GPU would hold; reason: why the plan falls out, or was not played."""

    plan: Plan
    status: Status
    gib: float | None = None
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the plan: what cannot be rehearsed keeps its place."""
        return self.status in ("fits", "not rehearsed")

    def as_json(self) -> dict[str, Any]:
        """What tune.json holds."""
        return {"layout": layout_words(self.plan.workload), "status": self.status, "gib": self.gib, "reason": self.reason}


def rehearse_plans(answer: Answer, count: int, *, hardware_file: Path | None = None) -> list[Rehearsed]:
    """Rehearse one rank of each stage of the best `count` plans, and leave out of the answer those that do not pass.

    Raises MachineError where none could be played (no compiler, for example), or none passed: with the first one's reason.
    """
    found = []
    for number, plan in enumerate(answer.result.plans[:count], start=1):
        log.info("rehearsal %d of %d: %s", number, min(count, len(answer.result.plans)), layout_words(plan.workload))
        found.append(_rehearse(answer.question, plan, hardware_file))
        log.info("rehearsal %d: %s%s", number, found[-1].status, f", {found[-1].reason}" if found[-1].reason else "")
    if all(r.status == "not rehearsed" for r in found):
        raise MachineError("no plan could be rehearsed", why=found[0].reason, fix="Mend that, or leave out --rehearse.")
    if not any(r.passed for r in found):
        raise MachineError(
            f"none of the best {len(found)} plans passed its rehearsal",
            why=f"the first one: {found[0].status}: {found[0].reason}",
            fix=f"Raise --rehearse to look at more plans, or --headroom above {(answer.question.limits.headroom or 0.0) / GIB:g} GiB.",
        )
    passed = {id(r.plan) for r in found if r.passed}
    answer.result.plans = [p for n, p in enumerate(answer.result.plans) if n >= count or id(p) in passed]
    return found


def rehearsal_config(config: RunConfig, plan: Plan) -> RunConfig:
    """A plan's config with no more micro-batches than fill its pipeline twice: later ones repeat what these do and hold."""
    w, raw = plan.workload, planned(config, plan).model_dump()
    raw["data"] = config.data.model_dump(exclude_unset=True)
    raw["train"]["global_batch_size"] = w.dp * w.micro * min(w.microbatches, 2 * w.pp)
    return validate(raw)


def _rehearse(question: Question, plan: Plan, hardware_file: Path | None) -> Rehearsed:
    with tempfile.TemporaryDirectory(prefix="toolkit-tune-") as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(dump_config(rehearsal_config(question.config, plan), open_data=True))
        command = [sys.executable, "-m", "toolkit.cli", "rehearse", str(path), "--hardware", spec(question.hardware, plan.gpus), "--json"]
        command += ["--hardware-file", str(hardware_file.resolve())] if hardware_file else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return judge(question, plan, code=done.returncode, output=done.stdout, errors=done.stderr)


def judge(question: Question, plan: Plan, *, code: int, output: str, errors: str) -> Rehearsed:
    """A rehearsal's result from what the command printed and its exit code.

    What a rehearsal does not see (the driver's context, NCCL's and cuBLAS's buffers) is added from the estimate.
    """
    answer = next((json.loads(line) for line in output.splitlines() if line.startswith('{"hardware"')), None)
    if answer is None:
        lines = [line.strip().removeprefix("error: ") for line in errors.splitlines() if line.strip()]
        told = next((line for line in reversed(lines) if line), f"exit code {code}")
        return Rehearsed(plan=plan, status="not rehearsed" if code == REFUSED else "failed", reason=told[:400])
    if answer["findings"]:
        finding = answer["findings"][0]
        return Rehearsed(plan=plan, status="ranks disagree", reason=f"{finding['kind']}: {finding['text']}")
    unseen = max(s.context + s.parts["workspace"] for s in plan.memory.stages)
    worst = max(answer["ranks"], key=lambda r: r["peak_reserved"])
    gib, capacity = (worst["peak_reserved"] + unseen) / GIB, plan.memory.capacity / GIB
    headroom = (question.limits.headroom or 0.0) / GIB
    if gib + headroom > capacity:
        need = f"stage {worst['stage']} needs {gib:.1f} GiB of {capacity:g} with {headroom:g} to be left free"
        return Rehearsed(plan=plan, status="does not fit", gib=gib, reason=f"{need}; the peak is in {worst['step']['peak']['phase']}")
    node = min(question.hardware.gpus_per_node, plan.gpus)
    host = max(r["host"]["peak"] for r in answer["ranks"]) * node
    if host > plan.memory.room:
        need = f"{host / GIB:.0f} GiB of host memory on a node, of {plan.memory.room / GIB:.0f} that offloading may take"
        return Rehearsed(plan=plan, status="does not fit", gib=gib, reason=need)
    return Rehearsed(plan=plan, status="fits", gib=gib)
