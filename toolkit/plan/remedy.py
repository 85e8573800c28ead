"""The nearest change of a config that fits into a device's memory: legal by the rules, sized by the estimate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from toolkit.config.schema import RunConfig
from toolkit.cost.memory import GIB, estimate
from toolkit.cost.workload import Workload
from toolkit.hardware.catalogue import Hardware
from toolkit.parallel.case import Machine
from toolkit.parallel.rules import violations

Option = dict[str, Any]

MOST_TIMES = 1024  # as many GPUs as there are, up to which enough ones are looked for


def nearest_fit(config: RunConfig, world_size: int, hardware: Hardware, *, machine: Machine, ran_out: bool = False) -> str:
    """What to set, as a sentence: the fewest and cheapest changes whose estimate fits, or how far the smallest one is off.

    ran_out: the run has run out of memory. A change that saves hardly anything is then no answer, even where its estimate fits.
    """
    smallest: tuple[float, Option] | None = None
    capacity = hardware.gpu.memory_gib * GIB
    most = min(capacity, 0.8 * estimate(Workload.of(config, world_size), hardware).worst.device) if ran_out else None
    for option in sorted(options(config), key=_cost):
        changed = with_keys(config, option)
        if changed is None or violations(changed, world_size, machine=machine):
            continue
        memory = estimate(Workload.of(changed, world_size), hardware)
        if not memory.host_fits:
            continue
        need = memory.worst.device
        if memory.fits if most is None else need <= most:
            return f"Set {_text(option)}: the estimate is then {need / GIB:.2f} GiB."
        if smallest is None or need < smallest[0]:
            smallest = need, option
    more = enough_gpus(config, world_size, hardware, machine=machine)
    if smallest is None:
        on_host = "cpu" in (config.zero.offload_optimizer, config.zero.offload_param)
        where = "The RAM of a node is the limit here, not GPU memory. " if on_host else ""
        return f"{where}{more or 'Use more ranks.'}{' Offloading to nvme (zero.nvme_path) takes no RAM.' if on_host else ''}"
    return (
        f"No single setting here fits: the smallest, {_text(smallest[1])}, still needs {smallest[0] / GIB:.2f} GiB. "
        f"{more or 'Use more ranks (parallel.tp, parallel.pp).'} A shorter train.seq_length or a smaller model needs less."
    )


def enough_gpus(config: RunConfig, world_size: int, hardware: Hardware, *, machine: Machine) -> str:
    """The fewest GPUs, doubling from those there are, on which a legal layout of this config fits, as a sentence; "" where none does.

    Looked at: the config's own layout with more copies, and a higher tensor or pipeline degree, with its recompute or full.
    """
    p, most = config.parallel, world_size * MOST_TIMES
    while world_size < most and hardware.gpu.accelerator:
        world_size *= 2
        larger = replace(hardware, nodes=max(1, world_size // hardware.gpus_per_node))
        if larger.count != world_size:
            larger = replace(hardware, gpus_per_node=world_size, nodes=1)
        for tp, pp, recompute in product((1, 2, 4, 8), (1, 2, 4, 8, 16), (config.train.recompute, "full")):
            option: Option = {"parallel.tp": p.tp * tp, "parallel.pp": p.pp * pp, "train.recompute": recompute}
            changed = with_keys(config, option)
            if changed is None or violations(changed, world_size, machine=machine):
                continue
            memory = estimate(Workload.of(changed, world_size), larger)
            if memory.host_fits and memory.fits:
                now = {"parallel.tp": p.tp, "parallel.pp": p.pp, "train.recompute": config.train.recompute}
                news = {key: value for key, value in option.items() if value != now[key]}
                return f"{world_size} GPUs are enough{f', with {_text(news)}' if news else ''}."
    return ""


def options(config: RunConfig) -> Iterator[Option]:
    """Every combination of more recompute, a smaller micro-batch, a higher ZeRO stage and offload, but the config itself."""
    t, z = config.train, config.zero
    modes = ("none", "selective", "full")
    recompute = [None, *modes[modes.index(t.recompute) + 1 :]]
    micro = [None, *(m for m in range(t.micro_batch_size - 1, 0, -1) if t.micro_batch_size % m == 0)]
    stages = [None, *range(z.stage + 1, 4)]
    optimizer = [None] + (["cpu"] if z.offload_optimizer == "none" else [])
    parameters = [None] + (["cpu"] if z.offload_param == "none" else [])
    inputs = [None] + ([True] if not t.offload_activations else [])
    keys = (
        "train.recompute", "train.micro_batch_size", "zero.stage", "zero.offload_optimizer", "zero.offload_param", "train.offload_activations"
    )  # fmt: skip
    for values in product(recompute, micro, stages, optimizer, parameters, inputs):
        option = {key: value for key, value in zip(keys, values, strict=True) if value is not None}
        if option:
            yield option


def _cost(option: Option) -> tuple[int, float]:
    """Fewer changes first, then those that cost less time: recompute and smaller micro-batches before offload."""
    price = {
        "train.recompute": 1.0,
        "train.micro_batch_size": 1.2,
        "zero.stage": 1.1,
        "zero.offload_optimizer": 3.0,
        "zero.offload_param": 5.0,
        "train.offload_activations": 2.0,
    }
    extra = 0.5 if option.get("train.recompute") == "full" else 0.0
    extra += 0.1 * option.get("zero.stage", 0) - 0.01 * option.get("train.micro_batch_size", 0)
    return len(option), sum(price[key] for key in option) + extra


def with_keys(config: RunConfig, option: Mapping[str, Any]) -> RunConfig | None:
    """A copy of a config with section.key values set; None where the schema refuses it."""
    raw = config.model_dump(mode="python")
    for dotted, value in option.items():
        section, key = dotted.split(".")
        raw[section][key] = value
    try:
        return RunConfig.model_validate(raw)
    except ValueError:
        return None


def _text(option: Option) -> str:
    return " and ".join(f"{key}={value}" for key, value in option.items())
