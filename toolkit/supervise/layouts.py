"""The layout of a run on the hosts that are there: the config's own where it fits, else the
planner's best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.cluster.environment import gpu_count
from toolkit.config.load import load_config
from toolkit.config.schema import RunConfig
from toolkit.data.vocabulary import with_vocabulary
from toolkit.errors import LayoutError
from toolkit.hardware.catalogue import Hardware, parse_hardware
from toolkit.parallel.layout import Layout
from toolkit.parallel.rules import Machine, check
from toolkit.plan.here import hardware_here
from toolkit.plan.reasons import degree_words
from toolkit.plan.space import AXES
from toolkit.plan.tune import Question, planned, tune


@dataclass(frozen=True)
class Start:
    """nodes: hosts that take part; words: overrides that change the config's layout; described: the
    layout for a person.
    """

    nodes: int
    words: tuple[str, ...]
    described: str


def machine() -> Machine:
    """What the rules ask of the hosts, which are taken to be like this one."""
    return Machine(cuda=gpu_count() > 0, transformer_engine=gpu_count() > 0)


class Layouts:
    """Answers for any number of hosts, each once. The global batch is the config's in all of them.

    hosts_of_config: as many as the config's own layout is meant for.
    """

    def __init__(self, path: Path, overrides: Sequence[str], *, slots: int, hosts_of_config: int) -> None:
        self.path, self.overrides, self.slots, self.whole = path, tuple(overrides), slots, hosts_of_config
        self.known: dict[int, Start] = {}

    def on(self, nodes: int) -> Start:
        """The layout for at most so many hosts; fewer take part where the batch does not divide by
        all of them.

        Raises LayoutError where none is legal and fits.
        """
        if nodes not in self.known:
            self.known[nodes] = self._own(nodes) if nodes >= self.whole else self._planned(nodes)
        return self.known[nodes]

    def _own(self, nodes: int) -> Start:
        layout = check(self._config(), nodes * self.slots, machine=machine())
        return Start(nodes, (), _described(layout, self._config()))

    def _planned(self, nodes: int) -> Start:
        config = with_vocabulary(self._config())
        for count in range(nodes, 0, -1):
            hardware = self._hardware(count)
            if hardware is None:
                return self._own(count)
            # what needs a compiler or another disk is not begun in the middle of the night
            held = {"offload_optimizer": (config.zero.offload_optimizer,), "offload_param": (config.zero.offload_param,)}
            try:
                answer = tune(Question(config=config, hardware=hardware, fixed=held), top=10, what_if=False)
            except LayoutError:
                if count == 1:
                    raise
                continue
            whole = [plan for plan in answer.result.plans if plan.gpus == count * self.slots]
            if not whole:
                continue
            chosen = planned(config, whole[0])
            keys = [dotted for dotted, _ in AXES.values() if dotted]
            words = [f"{key}={_text(_at(chosen, key))}" for key in keys if _at(chosen, key) != _at(config, key)]
            return Start(count, tuple(words), degree_words(whole[0].workload))
        raise LayoutError(f"no layout of this run uses all ranks of {nodes} hosts or fewer", fix="Set another train.global_batch_size.")

    def _config(self) -> RunConfig:
        return load_config(self.path, self.overrides)

    def _hardware(self, nodes: int) -> Hardware | None:
        here = hardware_here(self.slots)
        if here is None:
            return None
        return parse_hardware(f"{here.gpu.name}:{self.slots}x{nodes}")


def _described(layout: Layout, config: RunConfig) -> str:
    return f"tp {layout.tp} pp {layout.pp} dp {layout.dp} ZeRO-{config.zero.stage}"


def _at(config: RunConfig, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
