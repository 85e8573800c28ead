"""What `toolkit tune` may choose: the axes of a layout, their values, and what the user fixed of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from toolkit.config.explain import nearest
from toolkit.config.schema import RunConfig
from toolkit.cost.workload import Workload
from toolkit.errors import ConfigError
from toolkit.hardware.catalogue import Hardware
from toolkit.parallel.case import Case
from toolkit.parallel.narrow import Broken, rules_by_group
from toolkit.parallel.options import chunk_counts, divisors

# an axis, its config key (dp follows from the GPUs and has none) and, where few, its values
AXES: Mapping[str, tuple[str | None, tuple[Any, ...] | None]] = {
    "tp": ("parallel.tp", None),
    "pp": ("parallel.pp", None),
    "vpp": ("parallel.vpp", None),
    "cp": ("parallel.cp", None),
    "dp": (None, None),
    "sp": ("parallel.sequence_parallel", (False, True)),
    "zero": ("zero.stage", (0, 1, 2, 3)),
    "offload_optimizer": ("zero.offload_optimizer", ("none", "cpu", "nvme")),
    "offload_param": ("zero.offload_param", ("none", "cpu", "nvme")),
    "recompute": ("train.recompute", ("none", "selective", "full")),
    "micro": ("train.micro_batch_size", None),
}
_BY_KEY = {key: axis for axis, (key, _) in AXES.items() if key} | {axis: axis for axis in AXES}

# of a context-parallel rank: with fewer, copies or tensor parallel ranks are the better use of GPUs, and the search takes longer
LEAST_TOKENS = 4096
Sharding = tuple[int, str, str]  # ZeRO stage, optimizer offload, parameter offload
# what a search changes of a Case, by what it changes together
_CHANGED = {
    "cut": ("tp", "pp", "vpp", "cp", "sp"),
    "batch": ("world", "micro"),
    "recompute": ("recompute",),
    "sharding": ("stage", "opt_offload", "param_offload"),
}


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The rules by when a search has to ask them; each list is independent of what the others look at."""

    once: list[Broken]  # they look at nothing that a search changes
    of_sharding: list[Broken]  # at the sharding alone
    of_batch: list[Broken]  # at degrees and micro-batch alone
    of_recompute: list[Broken]  # at the recomputation, perhaps beside those
    of_both: list[Broken]  # at the sharding and anything else

    @classmethod
    def sorted_out(cls) -> _Asked:
        asked = cls(once=[], of_sharding=[], of_batch=[], of_recompute=[], of_both=[])
        for looked_at, rules in rules_by_group(_CHANGED).items():
            if "sharding" in looked_at:
                place = asked.of_sharding if len(looked_at) == 1 else asked.of_both
            elif "recompute" in looked_at:
                place = asked.of_recompute
            else:
                place = asked.of_batch if looked_at else asked.once
            place += rules
        return asked


def parse_fixes(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Values an axis is held to, from `parallel.tp=2`, `tp=2` or, for several, `zero.stage=1,2`.

    Raises ConfigError for an unknown axis (with the nearest one), a wrong value, or an axis given twice.
    """
    fixed: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        key, equals, given = text.partition("=")
        axis = _BY_KEY.get(key.strip())
        if axis is None or not equals:
            near = nearest(key.strip(), _BY_KEY, cutoff=0.5)
            hint = f"Did you mean {near}? " if near and axis is None else ""
            raise ConfigError(
                f"--fix {text!r} names nothing that tune chooses", fix=f"{hint}Write AXIS=VALUE with one of {', '.join(AXES)}."
            )
        if axis in fixed:
            raise ConfigError(
                f"--fix gives {axis} twice", why="the two contradict each other", fix=f"Write {axis}=A,B to allow two values."
            )
        fixed[axis] = tuple(_value(axis, part.strip()) for part in given.split(","))
    return fixed


def is_axis(override: str) -> bool:
    """Whether a `section.key=value` override sets something that tune would choose."""
    key = override.partition("=")[0].strip()
    return "." in key and key in _BY_KEY


def _value(axis: str, text: str) -> Any:
    known = AXES[axis][1]
    if known is None:
        if text.isdecimal() and int(text) >= 1:
            return int(text)
        raise ConfigError(f"--fix {axis}={text!r} is no degree", fix="Use a whole number of at least 1.")
    for value in known:
        if text.lower() == str(value).lower():
            return value
    raise ConfigError(f"--fix {axis}={text!r} is not possible", fix=f"Use one of {', '.join(str(v).lower() for v in known)}.")


@dataclass(frozen=True, kw_only=True)
class Structure:
    """How the model is cut, whatever the batch: the degrees but dp."""

    tp: int
    pp: int
    vpp: int
    cp: int
    sp: bool

    @property
    def ranks(self) -> int:
        """GPUs of one copy of the model."""
        return self.tp * self.pp * self.cp


def structure_of(w: Workload) -> Structure:
    """How a workload cuts its model."""
    return Structure(tp=w.tp, pp=w.pp, vpp=w.vpp, cp=w.cp, sp=w.sp)


def sharding_of(w: Workload) -> Sharding:
    """How a workload shards its states and where they lie."""
    return w.zero, w.offload_optimizer, w.offload_param


@dataclass(frozen=True, kw_only=True)
class Space:
    """All candidates for a config on at most max_gpus GPUs: what the axes span, whole nodes at a time; legality is the rules'."""

    case: Case
    base: Workload
    hardware: Hardware
    max_gpus: int
    fixed: Mapping[str, tuple[Any, ...]]

    @classmethod
    def of(cls, config: RunConfig, hardware: Hardware, *, max_gpus: int | None = None, fixed: Mapping[str, tuple[Any, ...]]) -> Space:
        """The space of a config on a cluster; its GPUs are taken to have CUDA and Transformer Engine."""
        case = Case.of(config, 1, machine=hardware.machine)
        most = hardware.count if max_gpus is None else min(max_gpus, hardware.count)
        return cls(case=case, base=Workload.of(config, 1), hardware=hardware, max_gpus=most, fixed=fixed)

    def allows(self, axis: str, value: Any) -> bool:
        """Whether the user left an axis free to take a value."""
        return axis not in self.fixed or value in self.fixed[axis]

    def shardings(self) -> list[Sharding]:
        """ZeRO stages with their offloads, the plain ones first."""
        stages, optimizer, param = (AXES[a][1] or () for a in ("zero", "offload_optimizer", "offload_param"))
        allowed = [
            (z, o, p)
            for o in optimizer
            for p in param
            for z in stages
            if self.allows("zero", z) and self.allows("offload_optimizer", o) and self.allows("offload_param", p)
        ]
        return sorted(allowed, key=lambda s: (s[1] != "none", s[2] != "none"))

    @cached_property
    def recomputes(self) -> tuple[str, ...]:
        """Recompute modes, least work first."""
        return tuple(r for r in AXES["recompute"][1] or () if self.allows("recompute", r))

    def structures(self) -> Iterator[tuple[Structure, list[Sharding]]]:
        """Every way to cut the model that breaks no rule with one copy and micro-batches of one, with its legal shardings.

        More copies and larger micro-batches can only break further rules; those are asked again for each candidate. A degree
        that is illegal beside degrees of 1, or a sharding on the fewest GPUs it can have (one, or hpZ's group), is left out at once.
        """
        whole = Structure(tp=1, pp=1, vpp=1, cp=1, sp=False)
        shardings = [s for s in self.shardings() if self._sharding_legal(s)] if self._open else []
        shardings = self._legal(whole, shardings)
        for tp in self._degrees("tp", self.case.heads):
            for cp in self._contexts() if self._legal(replace(whole, tp=tp), shardings) else ():
                for pp in self._pipelines() if self._legal(replace(whole, tp=tp, cp=cp), shardings) else ():
                    for vpp in self._interleaves(pp) if tp * cp * pp <= self.max_gpus else ():
                        for sp in (False, True) if tp > 1 else (False,):
                            cut = Structure(tp=tp, pp=pp, vpp=vpp, cp=cp, sp=sp)
                            legal = self._legal(cut, shardings) if self.allows("sp", sp) else []
                            if legal:
                                yield cut, legal

    def copies(self, cut: Structure) -> list[int]:
        """Data-parallel degrees of a structure: divisors of the batch that fill whole nodes, or a part of one."""
        each, node = cut.ranks, self.hardware.gpus_per_node
        return [
            dp for dp in self._degrees("dp", self.case.batch) if each * dp <= self.max_gpus and (each * dp % node == 0 or each * dp < node)
        ]

    def micros(self, dp: int) -> list[int]:
        """Micro-batches that divide one copy's share of the batch, ascending."""
        return self._degrees("micro", self.case.batch // dp)

    def legal(self, cut: Structure, dp: int, micro: int, recompute: str, sharding: Sharding) -> bool:
        """What the table of rules says of one candidate."""
        if not (self._open and self._sharding_legal(sharding) and self.batch_legal(cut, dp, micro)):
            return False
        return bool(self.legal_shardings(cut, dp, micro, recompute, [sharding]))

    def holds(self, w: Workload) -> bool:
        """Whether a layout is one of these candidates."""
        cut, sharding = structure_of(w), sharding_of(w)
        axes: dict[str, Any] = {"tp": w.tp, "pp": w.pp, "vpp": w.vpp, "sp": w.sp, "recompute": w.recompute, "micro": w.micro}
        axes |= {"zero": w.zero, "offload_optimizer": w.offload_optimizer, "offload_param": w.offload_param}
        if not all(self.allows(axis, value) for axis, value in axes.items()):
            return False
        within = w.cp in self._contexts() and w.dp in self.copies(cut)
        return within and self.legal(cut, w.dp, w.micro, w.recompute, sharding)

    def batch_legal(self, cut: Structure, dp: int, micro: int) -> bool:
        """Whether the degrees and the micro-batch break no rule, whatever the recomputation and the sharding."""
        self._put(cut, dp, micro)
        return not any(broken(self.case) for broken in self._asked.of_batch)

    def legal_shardings(self, cut: Structure, dp: int, micro: int, recompute: str, shardings: Sequence[Sharding]) -> list[Sharding]:
        """Those of a structure's shardings that are legal with a legal batch."""
        case, found = self.case, []
        self._put(cut, dp, micro)
        case.recompute = recompute
        if any(broken(case) for broken in self._asked.of_recompute):
            return []
        for sharding in shardings:
            case.stage, case.opt_offload, case.param_offload = sharding
            if not any(broken(case) for broken in self._asked.of_both):
                found.append(sharding)
        return found

    def workload(self, cut: Structure, dp: int, micro: int, recompute: str, sharding: Sharding) -> Workload:
        """The candidate as the estimator takes it."""
        zero, optimizer, param = sharding
        return self.base.laid_out(
            tp=cut.tp,
            pp=cut.pp,
            vpp=cut.vpp,
            cp=cut.cp,
            sp=cut.sp,
            dp=dp,
            micro=micro,
            recompute=recompute,
            zero=zero,
            offload_optimizer=optimizer,
            offload_param=param,
        )

    def _contexts(self) -> list[int]:
        """Context-parallel degrees that leave each rank a part worth sharing out, or those that were asked for."""
        return [cp for cp in self._degrees("cp", self.case.seq) if cp == 1 or "cp" in self.fixed or self.case.seq // cp >= LEAST_TOKENS]

    def _pipelines(self) -> list[int]:
        return sorted({pp for count in chunk_counts(self.case.layers) for pp in self._degrees("pp", count)})

    def _interleaves(self, pp: int) -> list[int]:
        return [n // pp for n in chunk_counts(self.case.layers) if n % pp == 0 and self.allows("vpp", n // pp)]

    def _degrees(self, axis: str, divided: int) -> list[int]:
        return [v for v in divisors(divided) if self.allows(axis, v)]

    def _legal(self, cut: Structure, shardings: Sequence[Sharding]) -> list[Sharding]:
        fewest = max(1, self.case.hpz)  # hpZ's groups are made of whole copies, so there are at least as many as one group holds
        if not shardings or not self.batch_legal(cut, fewest, 1):
            return []
        legal: set[Sharding] = set()
        for recompute in self.recomputes:
            legal |= {*self.legal_shardings(cut, fewest, 1, recompute, shardings)}
            if len(legal) == len(shardings):
                return list(shardings)
        return [s for s in shardings if s in legal]

    @cached_property
    def _asked(self) -> _Asked:
        return _Asked.sorted_out()

    @cached_property
    def _open(self) -> bool:
        """Whether the rules that no choice can mend hold."""
        return not any(broken(self.case) for broken in self._asked.once)

    def _sharding_legal(self, sharding: Sharding) -> bool:
        case = self.case
        case.stage, case.opt_offload, case.param_offload = sharding
        return not any(broken(case) for broken in self._asked.of_sharding)

    def _put(self, cut: Structure, dp: int, micro: int) -> None:
        case = self.case
        case.world, case.micro = cut.tp * cut.pp * cut.cp * dp, micro
        case.tp, case.pp, case.vpp, case.cp, case.sp = cut.tp, cut.pp, cut.vpp, cut.cp, cut.sp


def spec(hardware: Hardware, gpus: int) -> str:
    """The part of a cluster with so many GPUs, as `GPU:PER_NODExNODES`."""
    node = hardware.gpus_per_node
    return f"{hardware.gpu.name}:{gpus}" if gpus < node else f"{hardware.gpu.name}:{node}x{math.ceil(gpus / node)}"
