"""The config and the layout of a generation: the model's own section, cut as the command line says. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.config.load import override_config, parse_config
from toolkit.config.schema import ModelSection, RunConfig
from toolkit.errors import ConfigError
from toolkit.parallel.layout import Layout
from toolkit.parallel.rules import check

_KEYS = ("parallel.tp", "parallel.pp")
_NOT_THERE = {
    "parallel.vpp": "a stage that generates has one chunk",
    "parallel.cp": "a single new token cannot be shared out",
    "parallel.sequence_parallel": "a single new token cannot be shared out",
}


def plan(section: ModelSection, overrides: Sequence[str], *, processes: int, precision: str) -> tuple[RunConfig, Layout]:
    """Config and layout of `processes` ranks; raises ConfigError or LayoutError with the nearest degrees that would do."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in _KEYS:
            raise ConfigError(
                f"{override} has no place in a generation",
                why=_NOT_THERE.get(key, "the model and its weights are what the checkpoint says"),
                fix=f"Set {' and '.join(_KEYS)} alone.",
            )
    model = section.model_copy(update={"impl": "local", "compile": False, "dropout": 0.0, "preset": None, "sliding_window": None})
    raw = parse_config({"model": model.model_dump(), "train": {"precision": precision, "seq_length": 1}, "zero": {"stage": 0}})
    config = override_config(raw.model_dump(), overrides)
    copies = max(1, processes // (config.parallel.tp * config.parallel.pp))
    config.train.global_batch_size = copies  # of training alone; any that the rules take
    layout = check(config, processes)
    config.model.sliding_window = section.sliding_window  # the cache keeps to it, which training's attention does not
    return config, layout
