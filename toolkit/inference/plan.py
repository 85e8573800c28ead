"""The config and the layout of a generation: the model's own section, cut as the command line says.
No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from toolkit.config.load import override_config, parse_config
from toolkit.config.schema import ModelSection, RunConfig
from toolkit.errors import ConfigError, LayoutError
from toolkit.parallel.generation import counts_of
from toolkit.parallel.layout import Layout
from toolkit.parallel.options import nearest_first
from toolkit.parallel.rules import GenerationCase, check, generation_violations, refuse
from toolkit.plan.cut import nearly_even_cut
from toolkit.plan.generation import tensor_degrees_of

_KEYS = ("parallel.tp", "parallel.pp")
_NOT_THERE = {
    "parallel.vpp": "a stage that generates has one chunk",
    "parallel.cp": "a single new token cannot be shared out",
    "parallel.sequence_parallel": "a single new token cannot be shared out",
}


def plan(
    section: ModelSection, overrides: Sequence[str], *, processes: int, precision: str, layers_per_stage: str = "even"
) -> tuple[RunConfig, Layout]:
    """Config and layout of `processes` ranks; raises ConfigError or LayoutError with the nearest
    degrees that would do.

    layers_per_stage: as the option; "measured" gives a cut that is nearly even, to begin with.
    """
    check_keys(overrides)
    model = section.model_copy(update={"impl": "local", "compile": False, "dropout": 0.0, "preset": None, "sliding_window": None})
    raw = parse_config({"model": model.model_dump(), "train": {"precision": precision, "seq_length": 1}, "zero": {"stage": 0}})
    config = override_config(raw.model_dump(), overrides)
    check_tensor_degree(config)
    config.train.global_batch_size = processes  # of training alone; any that the rules take
    if layers_per_stage != "even":
        layout = _uneven(config, processes, layers_per_stage)
    else:
        layout = check(config, processes)
    config.model.sliding_window = section.sliding_window  # the cache keeps to it, which training's attention does not
    return config, layout


def _uneven(config: RunConfig, processes: int, layers_per_stage: str) -> Layout:
    """A layout whose stages may hold unequally many layers."""
    pp, layers, counts = config.parallel.pp, config.model.num_layers, counts_of(layers_per_stage)
    measured = layers_per_stage == "measured"
    refuse(generation_violations(GenerationCase(pp=pp, layers=layers, layers_per_stage=counts, measured=measured)))
    # the rules of training want stages of equally many layers: one on each stands for any number here
    even = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": pp})})
    return replace(check(even, processes), layers_per_stage=counts or nearly_even_cut(layers, pp))


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
    """Refuse a tensor degree that the model cannot be cut by; the nearest ones are named whatever
    the number of processes.
    """
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
