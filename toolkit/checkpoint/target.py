"""The layout that a checkpoint is to be cut for: checked before anything is read, and its
partitions in integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.arch.spec import TIED_NAME
from toolkit.checkpoint.identity import layout_of
from toolkit.checkpoint.manifest import Manifest
from toolkit.checkpoint.names import holder
from toolkit.config.deepspeed import zero_key
from toolkit.config.load import override_config
from toolkit.config.schema import RunConfig
from toolkit.engine.partitions import Cut, partitions, stage_parameters
from toolkit.errors import CheckpointError, ConfigError
from toolkit.parallel.deepspeed_json import deepspeed_config
from toolkit.parallel.layout import Layout
from toolkit.parallel.rules import Machine, check, fitting_micro_batch

if TYPE_CHECKING:
    from toolkit.checkpoint.whole import WholeCheckpoint

_CUTS = ("parallel.", "zero.", "train.precision=", "train.micro_batch_size=")
_SUB_GROUP_SIZE = 1_000_000_000  # DeepSpeed's default
_ANY_MACHINE = Machine(cuda=True, transformer_engine=True)  # the run's, not this one, must have what the config asks for


@dataclass(frozen=True)
class Target:
    """What a resharded checkpoint is cut for."""

    config: RunConfig
    layout: Layout

    @classmethod
    def of(cls, source: Manifest, overrides: Sequence[str], *, processes: int | None, path: Path) -> Target:
        """A checkpoint's own config with overrides, on `processes` processes (default: as many as saved it).

        Raises ConfigError, or LayoutError where the layout is not legal, or CheckpointError where
        this checkpoint cannot be cut for it.
        """
        if source.weights_only:
            raise CheckpointError(
                f"{path} holds weights without optimizer states",
                why="whole weights have no layout",
                fix="Start from it in any layout with checkpoint.init_from.",
            )
        for override in overrides:
            if not override.startswith(_CUTS):
                raise ConfigError(
                    f"{override} does not change how a checkpoint is cut",
                    fix="Set parallel.*, zero.*, train.precision and train.micro_batch_size here, and the rest when resuming.",
                )
        config = override_config(source.config, overrides)
        world = source.processes if processes is None else processes
        micro = fitting_micro_batch(config, world, machine=_ANY_MACHINE)
        if micro is not None:
            config.train.micro_batch_size = micro
        layout = check(config, world, machine=_ANY_MACHINE)
        offload = zero_key(config, "offload_optimizer", {})
        if offload.get("ratio", 1) != 1 or offload.get("super_offload"):
            raise CheckpointError(
                "the DeepSpeed JSON offloads part of the optimizer states (ratio or super_offload)",
                why="which part is known to the running engine alone",
                fix="Resume from the checkpoint as it is: the run reshards it on the fly.",
            )
        return cls(config, layout)

    @property
    def cut(self) -> dict[str, Any]:
        return layout_of(self.config, self.layout)

    @property
    def holders(self) -> list[int]:
        """Ranks that have files of partitions."""
        ranks = range(self.layout.world_size)
        return [r for r in ranks if holder(self.layout, r, stage=self.config.zero.stage) == r]

    def cuts(self, whole: WholeCheckpoint, rank: int) -> list[Cut]:
        """A rank's partitions as the engine of this layout has them."""
        spec, zero = self.config.model.spec, deepspeed_config(self.config, self.layout)["zero_optimization"]
        tied = TIED_NAME if spec.tied and self.layout.pp > 1 else None
        stage = self.layout.coordinates(rank).pp
        names = stage_parameters(spec, self.layout, stage=stage)
        size = zero.get("sub_group_size", "auto")
        groups = self.config.optimizer.spec.split([spec.weight(n) for n in names], tied=tied)
        return partitions(
            [[weight.name for weight in group] for group in groups],
            {n: whole.parameter(n).shard_shape(self.layout.tp) for n in names},
            self.layout,
            rank=rank,
            zero_stage=self.config.zero.stage,
            sub_group_size=_SUB_GROUP_SIZE if size == "auto" else int(size),
        )

    def parameters(self, whole: WholeCheckpoint, names: set[str]) -> dict[str, Any]:
        """What a file's header says of parameters, as EngineState has it."""
        found = {n: whole.parameter(n) for n in whole.names if n in names}
        return {n: {"shape": p.shard_shape(self.layout.tp), "dim": p.dim, "blocks": p.blocks} for n, p in found.items()}
