"""All that a run needs to know before torch is imported, found out once: in the starting process,
and in every rank.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.checkpoint.claim import checkpoint_folder
from toolkit.checkpoint.manifest import Manifest, discover
from toolkit.checkpoint.start import starting_weights
from toolkit.cluster.environment import PLANNED, gpu_count
from toolkit.cluster.needs import check_needs
from toolkit.config.schema import RunConfig
from toolkit.data.dataset import PreparedData, resolve_data
from toolkit.data.given import GivenData
from toolkit.errors import ConfigError
from toolkit.parallel.deepspeed_json import deepspeed_config
from toolkit.parallel.layout import Layout
from toolkit.parallel.rules import Machine, check, fitting_micro_batch

log = logging.getLogger("toolkit.train")


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run with nothing left open: whoever gets it derives none of this again.

    config: with the vocabulary, the tokenizer and the micro-batch that the run really has;
    ds_config: what DeepSpeed is given; weights: the checkpoint to start from and its manifest, None
    where the run resumes or starts from random weights.
    """

    config: RunConfig
    layout: Layout
    data: PreparedData | GivenData
    ds_config: dict[str, Any]
    weights: tuple[Path, Manifest] | None


def machine() -> Machine:
    """The facts about this machine that the rules ask for."""
    return Machine(cuda=gpu_count() > 0, transformer_engine=importlib.util.find_spec("transformer_engine") is not None)


def resolve(config: RunConfig, world_size: int, *, given: GivenData | None = None) -> ResolvedRun:
    """Check a config against the rules and its data, preparing the data where it is missing.

    The config itself stays as it is: the result holds a copy. It has model.vocab_size and
    data.tokenizer from the data, and a lower train.micro_batch_size where a run that resumes needs
    it. given: data sets in the place of data.source. Raises ToolkitError.
    """
    config = config.model_copy(deep=True)
    config.run.dir = config.run.dir.expanduser()
    _fit_micro_batch(config, world_size)
    check(config, world_size, machine=machine())
    if config.train.check_replicas_every and config.zero.stage == 3:
        raise ConfigError(
            f"train.check_replicas_every={config.train.check_replicas_every} with zero.stage=3",
            why="each rank holds its own part of the weights, so there are no replicas",
            fix="Set train.check_replicas_every to 0, or zero.stage to 2 or less.",
        )
    if PLANNED not in os.environ:  # a rank whose starter has looked already
        check_needs(config)
    data = _prepared(config) if given is None else _given(config, given)
    layout = check(config, world_size, machine=machine())
    weights = starting_weights(config)
    return ResolvedRun(config=config, layout=layout, data=data, ds_config=deepspeed_config(config, layout), weights=weights)


def _prepared(config: RunConfig) -> PreparedData:
    """What data.source or data.blend name; the config gets what it left to the data."""
    data = resolve_data(config, prepare_missing=True)
    if config.model.vocab_size is None:
        config.model.vocab_size = data.vocab_size
    if data.tokenizer is not None:
        config.data.tokenizer = data.tokenizer  # the resolved config names what was used
    return data


def _given(config: RunConfig, given: GivenData) -> GivenData:
    """Data sets of the user's own; the config then names no source, as it alone does not say what
    the run reads.
    """
    if config.model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size is null", why="a data set of your own does not say how many ids there are", fix="Set model.vocab_size."
        )
    config.data.source = config.data.blend = None
    return given


def _fit_micro_batch(config: RunConfig, world_size: int) -> None:
    """A resumed run keeps its global batch on any number of ranks: take the largest micro-batch up
    to the configured one that fits.
    """
    configured, whole = config.train.micro_batch_size, config.train.global_batch_size
    micro = fitting_micro_batch(config, world_size, machine=machine())
    if micro is None or micro == configured or not _resumes(config):
        return
    config.train.micro_batch_size = micro
    layout = Layout.of(config, world_size)
    log.info(
        "train.micro_batch_size=%d does not fit the global batch of %d on %d data-parallel ranks: resuming with %d and %d micro-batches",
        configured,
        whole,
        layout.dp,
        micro,
        layout.num_microbatches,
    )


def _resumes(config: RunConfig) -> bool:
    """Whether there is a checkpoint to go on from; whether it is good is found out later."""
    try:
        return config.checkpoint.resume != "never" and any(f.manifest for f in discover(checkpoint_folder(config)))
    except OSError:
        return False  # who locks the folder will say what is wrong with it
