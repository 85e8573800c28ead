"""The answer to `which layout should I run`: the search, what would change it, and what to do when nothing fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.config.explain import validate
from toolkit.config.schema import RunConfig
from toolkit.cost.memory import GIB, HOST_SHARE, MemoryEstimate, estimate
from toolkit.cost.workload import Workload
from toolkit.errors import ConfigError, LayoutError
from toolkit.hardware import calibration
from toolkit.hardware.catalogue import Gpu, Hardware, catalogue, with_host_gib
from toolkit.parallel import rules
from toolkit.plan.choice import close_call, prefer_simple
from toolkit.plan.reasons import differences, duration, layout_words, share, size
from toolkit.plan.search import Limits, Objective, Plan, SearchResult, key, plan_of, search
from toolkit.plan.show import count
from toolkit.plan.space import AXES, Space, spec

MOST_RAM_GIB = 16384.0
LOOKED_AT = 6  # plans from which the simplest of those that cannot be told apart is taken, even if fewer are listed
MOST_NODES = 4096  # up to which "more GPUs" is looked for when nothing fits


@dataclass(kw_only=True)
class Question:
    """What the user asks: a config, a cluster, what is fixed, and what counts. Sizes in bytes, times in seconds."""

    config: RunConfig
    hardware: Hardware
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    max_gpus: int | None = None
    objective: Objective = "tokens/s"
    limits: Limits = field(default_factory=Limits)
    scale: float | None = None

    def with_host_gib(self, gib: float) -> Question:
        """The same with another RAM of a node, GiB; raises ConfigError for none."""
        return replace(self, hardware=with_host_gib(self.hardware, gib))

    def space(self) -> Space:
        """The candidates of this question."""
        return Space.of(self.config, self.hardware, max_gpus=self.max_gpus, fixed=self.fixed)

    def ask(self, *, top: int, known: Iterable[Workload] = ()) -> SearchResult:
        """Search it; known: of plans that may be good here too."""
        return search(self.space(), objective=self.objective, limits=self.limits, top=top, scale=self.scale, known=known)


@dataclass(kw_only=True)
class WhatIf:
    """A change of the hardware or the run, what the best plan would then do, and in which words."""

    change: str
    plan: Plan | None
    text: str


@dataclass(kw_only=True)
class Answer:
    """What tune found for a question."""

    question: Question
    result: SearchResult
    what_if: list[WhatIf] = field(default_factory=list)

    @property
    def best(self) -> Plan:
        return self.result.plans[0]

    @property
    def close(self) -> list[Plan]:
        """The listed plans that the estimate cannot tell from the best one, with it."""
        return [plan for plan in self.result.plans if close_call(plan, self.best, self.question.objective)]

    @property
    def config(self) -> RunConfig:
        """The run with the best plan's settings in it."""
        return planned(self.question.config, self.best)

    @property
    def spec(self) -> str:
        """The best plan's GPUs, as `estimate --hardware` takes them."""
        return spec(self.question.hardware, self.best.gpus)


def tune(question: Question, *, top: int = 10, what_if: bool = True) -> Answer:
    """Find the best plans for a question.

    Raises LayoutError where no layout is legal, none fits (by how much, and what would fit), or none meets the targets;
    ConfigError for constraints that contradict each other.
    """
    _check(question)
    result = question.ask(top=max(top, LOOKED_AT))
    if not result.candidates:
        raise _nothing_legal(question)
    if not result.plans:
        raise _nothing_meets(question) if _fits_without_targets(question) else _nothing_fits(question)
    result.plans = prefer_simple(_with_plain_pipelines(question, result.plans), question.objective)[:top]
    answer = Answer(question=question, result=result)
    if what_if:
        answer.what_if = what_ifs(answer)
    return answer


def _with_plain_pipelines(question: Question, plans: list[Plan]) -> list[Plan]:
    """The plans, and those of them that interleave once more without it, where the estimate cannot tell these from the best one.

    The search lists only the best few plans of the same degrees, and interleaving with different numbers of chunks may be all of them.
    """
    space, scale = question.space(), question.scale
    found = list(plans)
    for plan in plans:
        if plan.workload.vpp == 1 or not space.allows("vpp", 1) or not close_call(plan, plans[0], question.objective):
            continue
        plain = plan_of(plan.workload.laid_out(vpp=1), space, question.limits, scale=scale)
        if plain is None or any(other.workload == plain.workload for other in found) or not close_call(plain, plans[0], question.objective):
            continue
        found.append(plain)
    return sorted(found, key=lambda plan: key(question.objective, step_s=plan.expected_s, gpus=plan.gpus))


def what_ifs(answer: Answer) -> list[WhatIf]:
    """What other hardware and other sequences would change about the best plan."""
    return [_what_if(answer, change, other) for change, other in _changes(answer.question)]


def planned(config: RunConfig, plan: Plan) -> RunConfig:
    """The config with a plan's settings in it, validated; data keys that the user left unset stay so."""
    w = plan.workload
    raw = config.model_dump() | {"data": config.data.model_dump(exclude_unset=True)}
    for axis, (dotted, _) in AXES.items():
        if dotted:
            section, name = dotted.split(".")
            raw[section][name] = getattr(w, axis)
    return validate(raw)


def _check(question: Question) -> None:
    limits, hardware = question.limits, question.hardware
    if question.max_gpus is not None and question.max_gpus < 1:
        raise ConfigError(f"--max-gpus {question.max_gpus} leaves no GPU", fix="Set it to 1 or more.")
    for name, value in (("--max-step", limits.max_step_s), ("--max-cost", limits.max_cost), ("--price", limits.price)):
        if value is not None and value <= 0:
            raise ConfigError(f"{name} {value:g} is not above 0", fix="Leave it out, or give a positive number.")
    if limits.max_cost is not None and limits.price is None:
        raise ConfigError("--max-cost has no price to be reckoned with", fix="Set --price to what one GPU costs an hour.")
    if not 0 < limits.risk < 1:
        raise ConfigError(f"--risk {limits.risk:g} is no probability", fix="Give one between 0 and 1, such as 0.1.")
    if limits.headroom is not None and not 0 <= limits.headroom < hardware.gpu.memory_gib * GIB:
        raise ConfigError(
            f"--headroom {limits.headroom / GIB:g} leaves nothing of the {hardware.gpu.memory_gib:g} GiB of a {hardware.gpu.name}",
            fix="Set it to 0 or more, and less than that.",
        )
    most = min(hardware.count, question.max_gpus or hardware.count)
    least = 1
    for axis in ("tp", "pp", "cp", "dp"):
        least *= min(question.fixed.get(axis, (1,)))
    if least > most:
        fixed = " × ".join(f"{a}={min(question.fixed[a])}" for a in ("tp", "pp", "cp", "dp") if a in question.fixed)
        limit = f"--max-gpus {most}" if question.max_gpus is not None and question.max_gpus < hardware.count else str(hardware)
        raise ConfigError(f"{fixed} needs {least} GPUs, and {limit} allows {most}", fix="Fix smaller degrees, or allow more GPUs.")


def _nothing_legal(question: Question) -> LayoutError:
    """Say which rule refuses the user's own settings, since no choice of the free ones mends it."""
    raw = question.config.model_dump()
    raw["parallel"] |= {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "sequence_parallel": False}
    offloads = any(question.fixed.get(axis, ("none",))[0] != "none" for axis in ("offload_optimizer", "offload_param"))
    case = question.space().case
    highest = offloads or case.hpz > 1 or case.qwz or case.qgz
    raw["zero"] |= {"stage": 3 if highest else 1, "offload_optimizer": "none", "offload_param": "none"}
    raw["train"] |= {"micro_batch_size": 1, "recompute": "none"}
    for axis, values in question.fixed.items():
        if dotted := AXES[axis][0]:
            section, name = dotted.split(".")
            raw[section][name] = values[0]
    p = raw["parallel"]
    world = p["tp"] * p["pp"] * p["cp"] * question.fixed.get("dp", (max(1, case.hpz),))[0]
    fixed = ", ".join(f"{axis}={'|'.join(str(v).lower() for v in values)}" for axis, values in question.fixed.items())
    where = f"no layout is legal{f' with {fixed} fixed' if fixed else ''} on {_gpus(question)}"
    try:
        broken = rules.violations(validate(raw), world, machine=question.hardware.machine)
    except ConfigError as error:
        return LayoutError(where, why=str(error))
    if not broken:
        return LayoutError(
            where,
            why=f"no number of copies divides train.global_batch_size={question.config.train.global_batch_size} and fills whole nodes",
            fix="Change the batch, the GPUs or what is fixed.",
        )
    more = f" ({len(broken) - 1} more rules are broken)" if len(broken) > 1 else ""
    return LayoutError(where, why=f"{broken[0].what}: {broken[0].why}{more}", fix="Change that, or leave more free.")


def _fits_without_targets(question: Question) -> bool:
    limits = question.limits
    if limits.max_step_s is None and limits.max_cost is None:
        return False
    return bool(replace(question, limits=replace(limits, max_step_s=None, max_cost=None)).ask(top=1).plans)


def _nothing_meets(question: Question) -> LayoutError:
    limits = question.limits
    free = replace(limits, max_step_s=None, max_cost=None)
    texts, fixes = [], []
    if limits.max_step_s is not None:
        fastest = replace(question, limits=free, objective="tokens/s").ask(top=1).plans[0]
        texts.append(
            f"--max-step {limits.max_step_s:g} s: the fastest plan ({layout_words(fastest.workload)}, {fastest.gpus} {question.hardware.units}) takes {duration(fastest.time.step)}"
        )
        fixes.append(f"--max-step {fastest.time.step:.3g}")
    if limits.max_cost is not None:
        cheapest = replace(question, limits=free, objective="cost").ask(top=1).plans[0]
        cost = limits.cost(cheapest.time.step, cheapest.gpus)
        texts.append(
            f"--max-cost {limits.max_cost:g}: the cheapest plan ({layout_words(cheapest.workload)}, {cheapest.gpus} {question.hardware.units}) costs {cost:,.0f}"
        )
        fixes.append(f"--max-cost {cost:.0f}")
    both = " Each alone can be met, both together cannot." if len(texts) == 2 and _each_alone(question) else ""
    return LayoutError("no plan meets the target", why="; ".join(texts) + "." + both, fix=f"Allow {' and '.join(fixes)}, or more GPUs.")


def _each_alone(question: Question) -> bool:
    one = replace(question.limits, max_cost=None), replace(question.limits, max_step_s=None)
    return all(replace(question, limits=limits).ask(top=1).plans for limits in one)


def _nothing_fits(question: Question) -> LayoutError:
    """By how much the layout that comes nearest misses, and what would make something fit."""
    sized = _all_sized(question)
    memory, workload = min(sized, key=lambda entry: _overfull(question, entry[0]))
    headroom = question.limits.room(memory)
    capacity, taken = memory.capacity, memory.worst.device
    misses = []
    if taken + headroom > capacity:
        over = size(taken + headroom - capacity)
        misses.append(f"takes {size(taken)} a GPU, {over} more than the {size(capacity)} there less {size(headroom)} of headroom")
    if not memory.host_fits:
        misses.append(
            f"offloads {size(memory.host)} to a node's RAM, {size(memory.host - memory.room)} more than the {size(memory.room)} that are free there"
        )
    alone = [m.worst.device + question.limits.room(m) for m, w in sized if m.host_fits]
    binds = [name for name, fits in (("GPU memory", taken + headroom <= capacity), ("the RAM of a node", memory.host_fits)) if not fits]
    return LayoutError(
        f"{count(workload.model.parameters)} parameters fit in no legal layout on {_gpus(question)}, limited by {' and '.join(binds)}",
        why=f"the one that comes nearest ({layout_words(workload)}) {' and '.join(misses)}",
        fix=" ".join(_remedies(question, min(alone, default=None))),
    )


def _gpus(question: Question) -> str:
    most = question.space().max_gpus
    units = question.hardware.units if most > 1 else "GPU" if question.hardware.gpu.accelerator else "process"
    return f"{'up to ' if most > 1 else ''}{most} {units} of {question.hardware}"


def _all_sized(question: Question) -> list[tuple[MemoryEstimate, Workload]]:
    """Every legal candidate of the smallest micro-batch and most recomputation, with its memory."""
    space, recompute = question.space(), question.space().recomputes[-1]
    sized = []
    for cut, shardings in space.structures():
        for dp in space.copies(cut):
            for micro in space.micros(dp)[:1]:
                for sharding in shardings:
                    if space.legal(cut, dp, micro, recompute, sharding):
                        w = space.workload(cut, dp, micro, recompute, sharding)
                        sized.append((estimate(w, question.hardware), w))
    return sized


def _overfull(question: Question, memory: MemoryEstimate) -> float:
    """Needed over available memory, of the device or of the node's RAM, whichever is fuller."""
    return max((memory.worst.device + question.limits.room(memory)) / memory.capacity, memory.host / memory.room)


def _remedies(question: Question, least: float | None) -> Iterator[str]:
    """Changes after which something fits, each tried; least: device bytes, with what is left free, of the leanest layout whose offload the RAM holds."""
    released = {axis: values for axis, values in question.fixed.items() if axis not in ("offload_optimizer", "offload_param", "zero")}
    for axis in ("recompute", "micro"):
        if axis in question.fixed and _tried(replace(question, fixed={a: v for a, v in question.fixed.items() if a != axis})):
            yield f"Leaving {axis} free makes it fit."
    if len(released) < len(question.fixed) and _tried(replace(question, fixed=released)):
        yield "Leaving the ZeRO stage and offload free makes it fit."
    if question.fixed and _tried(replace(question, fixed={})):
        yield "Fixing nothing makes it fit."
    if question.config.zero.nvme_path is None and question.hardware.gpu.accelerator:
        raw = question.config.model_dump()
        raw["zero"]["nvme_path"] = "nvme"
        if plan := _tried(replace(question, config=validate(raw))):
            yield f"Setting zero.nvme_path to a folder on local disks of {size(plan.memory.nvme)} a node makes it fit."
    hardware, nodes = question.hardware, question.hardware.nodes
    if hardware.gpu.accelerator and (plan := _tried(question.with_host_gib(MOST_RAM_GIB))):
        yield f"{plan.memory.host / HOST_SHARE / GIB:.1f} GiB of RAM a node makes it fit, with {layout_words(plan.workload)} (--host-gib)."
    while nodes < MOST_NODES:
        nodes *= 2
        if plan := _tried(replace(question, hardware=replace(hardware, nodes=nodes), max_gpus=None)):
            yield f"It fits on {spec(hardware, plan.gpus)} ({plan.gpus} GPUs)."
            break
    gib = least or 0
    larger = sorted((g for g in catalogue().values() if g.accelerator and g.memory_gib * GIB >= gib), key=lambda g: g.memory_gib)
    if least is not None and hardware.gpu.accelerator and gib > hardware.gpu.memory_gib * GIB and larger:
        yield f"A GPU of {size(gib)} would do, such as {larger[0].name.upper()}."


def _tried(question: Question, *, known: Iterable[Workload] = ()) -> Plan | None:
    plans = question.ask(top=1, known=known).plans or (question.ask(top=1).plans if known else [])
    return plans[0] if plans else None


def _changes(question: Question) -> Iterator[tuple[str, Question]]:
    """The what-if questions: larger device memory, faster links, more nodes, a longer sequence."""
    hardware, gpu = question.hardware, question.hardware.gpu
    if gpu.accelerator and (larger := _next_larger(gpu)):
        swapped = replace(hardware, gpu=replace(larger, host_gib=gpu.host_gib))  # in the same nodes
        yield f"{larger.name.upper()} instead", replace(question, hardware=swapped, scale=_scale_of(larger, question))
    if hardware.nodes > 1:
        yield "a network twice as fast", replace(question, hardware=replace(hardware, nic_gb_s=2 * hardware.nic_gb_s))
    elif hardware.count > 1 and gpu.accelerator:
        faster = replace(gpu, link_gb_s=2 * gpu.link_gb_s) if gpu.link_gb_s else replace(gpu, pcie_gb_s=2 * gpu.pcie_gb_s)
        yield "links between GPUs twice as fast", replace(question, hardware=replace(hardware, gpu=faster))
    if question.max_gpus is None:
        yield "twice the nodes", replace(question, hardware=replace(hardware, nodes=2 * hardware.nodes))
    raw = question.config.model_dump()
    raw["train"]["seq_length"] *= 2
    raw["model"]["max_position_embeddings"] = max(raw["model"]["max_position_embeddings"], raw["train"]["seq_length"])
    yield f"sequences of {raw['train']['seq_length']:,} tokens", replace(question, config=validate(raw))


def _next_larger(gpu: Gpu) -> Gpu | None:
    """The GPU with the next more memory: of the same generation where there is one, else of any."""
    larger = [g for g in catalogue().values() if g.accelerator and g.memory_gib > 1.1 * gpu.memory_gib]
    return min(larger, key=lambda g: (g.scale != gpu.scale, g.memory_gib), default=None)


def _scale_of(gpu: Gpu, question: Question) -> float | None:
    """The step-time scale of another GPU; as for the question's own where both share one."""
    if gpu.scale == question.hardware.gpu.scale:
        return question.scale
    return calibration.scale_for(gpu, question.config.train.precision)


def _neighbours(plans: Sequence[Plan]) -> Iterator[Workload]:
    """Layouts that may be good where something else than the layout has changed: those listed, with more recomputation, more
    context-parallel ranks or more copies. The first ones are the likeliest."""
    for recompute in (None, *(AXES["recompute"][1] or ())):
        for cp, dp in ((1, 1.0), (2, 0.5), (1, 2.0), (2, 1.0)):
            for plan in plans:
                w = plan.workload
                if recompute != w.recompute and (w.dp * dp).is_integer():
                    yield w.laid_out(recompute=recompute or w.recompute, cp=w.cp * cp, dp=int(w.dp * dp))


def _what_if(answer: Answer, change: str, question: Question) -> WhatIf:
    best, plan = answer.best, _tried(question, known=list(_neighbours(answer.result.plans)))
    if plan is None:
        return WhatIf(change=change, plan=None, text="nothing fits or meets the target")
    text = f"{share(plan.tokens_per_s, best.tokens_per_s)} tokens/s"
    if answer.question.objective != "tokens/s":
        text += (
            f", {share(plan.gpus * plan.time.step, best.gpus * best.time.step)} GPU time a step on {plan.gpus} {question.hardware.units}"
        )
    changed = differences(best.workload, plan.workload)
    return WhatIf(change=change, plan=plan, text=f"{text}, with {changed}" if changed else f"{text}, same layout")
