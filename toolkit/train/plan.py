"""All that can be refused before torch is imported: rules and data, in the starting process and in every rank."""

from __future__ import annotations

import importlib.util

from toolkit.checkpoint.start import starting_weights
from toolkit.cluster.environment import gpu_count
from toolkit.config.schema import RunConfig
from toolkit.data.dataset import PreparedData, resolve_data
from toolkit.parallel.layout import Layout
from toolkit.parallel.rules import Machine, check


def machine() -> Machine:
    """The facts about this machine that the rules ask for."""
    return Machine(cuda=gpu_count() > 0, transformer_engine=importlib.util.find_spec("transformer_engine") is not None)


def plan(config: RunConfig, world_size: int) -> tuple[Layout, PreparedData]:
    """Check a config against the rules and its data, preparing the data where it is missing.

    Fills model.vocab_size and data.tokenizer from the data. Raises ToolkitError.
    """
    check(config, world_size, machine=machine())
    data = resolve_data(config, prepare_missing=True)
    if config.model.vocab_size is None:
        config.model.vocab_size = data.vocab_size
    if data.tokenizer is not None:
        config.data.tokenizer = data.tokenizer  # the resolved config names what was used
    layout = check(config, world_size, machine=machine())
    starting_weights(config)
    return layout, data
