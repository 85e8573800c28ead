"""The config and the layout of a generation: the model's own section, cut as the command line says. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.config.load import override_config, parse_config
from toolkit.config.schema import ModelSection, RunConfig
from toolkit.errors import ConfigError, LayoutError
from toolkit.parallel.layout import Layout
from toolkit.parallel.options import nearest_first
from toolkit.parallel.rules import check
from toolkit.plan.generation import tensor_degrees_of

_KEYS = ("parallel.tp", "parallel.pp")
_NOT_THERE = {
    "parallel.vpp": "a stage that generates has one chunk",
    "parallel.cp": "a single new token cannot be shared out",
    "parallel.sequence_parallel": "a single new token cannot be shared out",
}


def plan(section: ModelSection, overrides: Sequence[str], *, processes: int, precision: str) -> tuple[RunConfig, Layout]:
    """Config and layout of `processes` ranks; raises ConfigError or LayoutError with the nearest degrees that would do."""
    check_keys(overrides)
    model = section.model_copy(update={"impl": "local", "compile": False, "dropout": 0.0, "preset": None, "sliding_window": None})
    raw = parse_config({"model": model.model_dump(), "train": {"precision": precision, "seq_length": 1}, "zero": {"stage": 0}})
    config = override_config(raw.model_dump(), overrides)
    check_tensor_degree(config)
    config.train.global_batch_size = processes  # of training alone; any that the rules take
    layout = check(config, processes)
    config.model.sliding_window = section.sliding_window  # the cache keeps to it, which training's attention does not
    return config, layout


def check_keys(overrides: Sequence[str]) -> None:
    """Refuse an override of anything but the degrees."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in _KEYS:
            raise ConfigError(
                f"{override} has no place in a generation",
                why=_NOT_THERE.get(key, "the model and its weights are what the checkpoint says"),
                fix=f"Set {' and '.join(_KEYS)} alone.",
            )


def check_tensor_degree(config: RunConfig) -> None:
    """Refuse a tensor degree that the model cannot be cut by; the nearest ones are named whatever the number of processes."""
    tp, spec = config.parallel.tp, config.model.spec
    parts = {
        "model.num_attention_heads": (spec.heads, "each rank computes whole attention heads"),
        "model.num_query_groups": (spec.groups, "each rank needs whole key/value groups, which are not replicated"),
        "model.ffn_hidden_size": (spec.ffn, "each rank holds an equal slice of the MLP"),
        "the padded vocabulary of": (spec.rows, "each rank holds equally many rows of it"),
    }
    for key, (number, why) in parts.items():
        if number % tp:
            near = sorted(nearest_first(tensor_degrees_of(spec), to=tp)[:2])
            raise LayoutError(
                f"parallel.tp={tp} does not divide {key}{' ' if ' ' in key else '='}{number}",
                why=why,
                fix=f"Set parallel.tp to {' or '.join(map(str, near))}.",
            )
