"""The Python API's Trainer: a config, and whatever of one's own is to be plugged into its run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

from toolkit.config.load import as_config
from toolkit.config.schema import RunConfig
from toolkit.data.given import GivenData
from toolkit.errors import ConfigError
from toolkit.runfolder.metrics import StepRecord
from toolkit.train.console import ConsoleLog
from toolkit.train.hooks import Extensions, Hook
from toolkit.train.program import mute_if_already_reported, quiet_libraries, say_uncaught_errors, set_cuda_defaults, speak
from toolkit.train.resolve import resolve


class Trainer:
    """A run, in one process or as one rank of those that the deepspeed launcher or torchrun has
    started: all make the same one.

    config: a YAML file, a mapping of its sections or a Config. overrides: {"section.key": value} or
    ["section.key=value"]. loss: see toolkit.engine.loss. optimizer: makes one in the place of
    optimizer.name's, see toolkit.engine.optimizers.plugged_in. dataset, eval_dataset: map-style data sets
    in the place of data.source, see toolkit.data.given; shuffle: train on `dataset` in an order
    that run.seed decides. on_step, on_eval, on_save: hooks, see toolkit.train.hooks.

    Raises ConfigError for what is wrong with the config. A script that does not catch a
    ToolkitError ends with its one message.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any] | str | PathLike[str],
        *,
        overrides: Mapping[str, Any] | Sequence[str] = (),
        loss: Callable[..., Any] | None = None,
        optimizer: Callable[..., Any] | None = None,
        dataset: Any = None,
        eval_dataset: Any = None,
        shuffle: bool = True,
        on_step: Hook | Sequence[Hook] | None = None,
        on_eval: Hook | Sequence[Hook] | None = None,
        on_save: Hook | Sequence[Hook] | None = None,
    ) -> None:
        say_uncaught_errors()
        if eval_dataset is not None and dataset is None:
            raise ConfigError("eval_dataset is given without dataset", fix="Give both, or leave both to data.source.")
        self.config = as_config(config, overrides)
        self.given = GivenData(train=dataset, valid=eval_dataset, shuffle=shuffle) if dataset is not None else None
        self.extensions = Extensions.of(loss=loss, optimizer=optimizer, on_step=on_step, on_eval=on_eval, on_save=on_save)

    def fit(self) -> StepRecord | None:
        """Train to the last step, and return its record; None where a checkpoint has already
        reached it.

        Raises ToolkitError on all ranks alike. The model is let go at the end: a checkpoint keeps
        it, and hooks see it before. The process group stays, so that another Trainer may follow in
        the same processes.
        """
        rank = int(os.environ.get("RANK", 0))
        speak(rank=rank)
        quiet_libraries()
        with ConsoleLog(rank=rank) as console:
            with mute_if_already_reported():
                resolved = resolve(self.config, int(os.environ.get("WORLD_SIZE", 1)), given=self.given)
            set_cuda_defaults(resolved.config)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of absent options that nothing here needs
                from toolkit.train.loop import train  # torch comes with it, once there is something to train

            return train(resolved, self.extensions, console)
