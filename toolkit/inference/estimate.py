"""`toolkit estimate --inference`: what generating with a model takes, from a run's YAML or from the
model itself, without a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.config.schema import ModelSection
from toolkit.cost.generation import Generation, generation_memory
from toolkit.errors import ConfigError, at_least_one
from toolkit.hardware.catalogue import Hardware
from toolkit.inference.plan import plan
from toolkit.plan.generation import check_way, generation_json, generation_text


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Options of the command. context: tokens of prompt and answer, None for all that the model
    knows; precision: None as the weights are.
    """

    batch: int = 1
    context: int | None = None
    weights: str = "none"
    kv: str = "none"
    offload: str = "none"
    precision: str | None = None


def estimate_generation(model: Path, overrides: Sequence[str], hardware: Hardware, *, asked: Asked, as_json: bool) -> tuple[str, bool]:
    """What to show, and whether it fits; ConfigError or LayoutError for what toolkit generate refuses."""
    at_least_one("--batch", asked.batch)
    at_least_one("--context", asked.context)
    section, precision, degrees = _model(model, overrides)
    config, layout = plan(section, degrees, processes=hardware.count, precision=asked.precision or precision)
    context = asked.context or section.max_position_embeddings
    way = Generation(
        model=config.model.spec,
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp,
        precision=config.train.precision,
        batch=asked.batch,
        context=context,
        prompt=max(1, context // 2),
        weights=asked.weights,
        kv=asked.kv,
        offload=asked.offload,
    )
    check_way(way, hardware, positions=section.max_position_embeddings)
    text = json.dumps(generation_json(way, hardware), indent=1) + "\n" if as_json else generation_text(way, hardware)
    return text, generation_memory(way, hardware).fits


def _model(path: Path, overrides: Sequence[str]) -> tuple[ModelSection, str, list[str]]:
    """What the model is, what its weights are stored in, and how it is to be cut."""
    if path.suffix in (".yaml", ".yml"):
        from toolkit.config.load import load_config
        from toolkit.data.vocabulary import with_vocabulary

        config = with_vocabulary(load_config(path, overrides))
        if config.model.vocab_size is None:
            raise ConfigError(
                "model.vocab_size is not known",
                why="the data that decides it is not prepared",
                fix="Set model.vocab_size=N, or prepare it.",
            )
        p = config.parallel
        return config.model, config.train.precision, [f"parallel.tp={p.tp}", f"parallel.pp={p.pp}"]
    from toolkit.inference.source import open_model

    model = open_model(path)
    return model.section, model.precision, list(overrides)
