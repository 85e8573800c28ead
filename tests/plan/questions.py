"""Small questions for tune: models and clusters whose whole space can be tried one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from toolkit.config.load import parse_config
from toolkit.cost.memory import estimate
from toolkit.cost.step import step_time
from toolkit.cost.workload import Workload
from toolkit.hardware.catalogue import parse_hardware
from toolkit.parallel import rules
from toolkit.parallel.case import Machine
from toolkit.plan.space import Space
from toolkit.plan.tune import Question

GPUS = Machine(cuda=True, transformer_engine=True)
SHAPE: dict[str, Any] = {
    "num_layers": 12,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
}
# values of each axis but dp, which follows from the GPUs; some of them never legal
CHOICES: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 3, 4),
    "pp": (1, 2, 3, 4),
    "vpp": (1, 2, 3),
    "cp": (1, 2),
    "sp": (False, True),
    "stage": (0, 1, 2, 3),
    "opt_offload": ("none", "cpu"),
    "param_offload": ("none", "cpu"),
    "recompute": ("none", "selective", "full"),
    "micro": (1, 2, 3, 4),
}


def question(spec: str = "h100-80gb:4", *, model: dict[str, Any] | None = None, batch: int = 8, seq: int = 4096, **more: Any) -> Question:
    """A question about a small Llama on a small cluster; more: fields of Question."""
    raw = {"model": SHAPE | (model or {}), "train": {"global_batch_size": batch, "seq_length": seq}}
    return Question(config=parse_config(raw), hardware=parse_hardware(spec), **more)


def one_by_one(asked: Question) -> Iterator[tuple[Workload, float]]:
    """Every combination of CHOICES on every number of GPUs of one node that the rules allow and that fits, with its expected step time."""
    hardware = asked.hardware
    case, base = rules.Case.of(asked.config, 1, machine=GPUS), Workload.of(asked.config, 1)
    for case.world in range(1, hardware.count + 1):
        for values in product(*CHOICES.values()):
            for name, value in zip(CHOICES, values, strict=True):
                setattr(case, name, value)
            if not rules.legal(case):
                continue
            w = replace(
                base,
                **{axis: getattr(case, axis) for axis in ("tp", "pp", "vpp", "cp", "dp", "sp", "recompute", "micro")},
                zero=case.stage,
                offload_optimizer=case.opt_offload,
                offload_param=case.param_offload,
            )
            memory = estimate(w, hardware)
            if asked.limits.fit(memory):
                yield w, step_time(w, hardware, scale=asked.scale).step / memory.chance


def candidates(space: Space) -> list[Workload]:
    """Every legal candidate of a space, one by one."""
    return [
        space.workload(cut, dp, micro, recompute, sharding)
        for cut, shardings in space.structures()
        for dp in space.copies(cut)
        for micro in space.micros(dp)
        for recompute in space.recomputes
        for sharding in shardings
        if space.legal(cut, dp, micro, recompute, sharding)
    ]


def identity(w: Workload) -> tuple[Any, ...]:
    """What tells two candidates apart."""
    return w.tp, w.pp, w.vpp, w.cp, w.dp, w.sp, w.zero, w.offload_optimizer, w.offload_param, w.recompute, w.micro


def smaller_memory(asked: Question, gib: float) -> Question:
    """The same question on GPUs of less memory."""
    return replace(asked, hardware=replace(asked.hardware, gpu=replace(asked.hardware.gpu, memory_gib=gib)))
