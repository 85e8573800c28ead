"""The planner for a program: a config, a cluster by name, and an answer as data. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from toolkit.config.load import as_config
from toolkit.config.schema import RunConfig
from toolkit.data.vocabulary import with_vocabulary
from toolkit.hardware.calibration import measured, scale_for
from toolkit.hardware.catalogue import parse_hardware
from toolkit.plan.search import Limits, Objective
from toolkit.plan.show import estimate_json
from toolkit.plan.space import is_axis, parse_fixes
from toolkit.plan.tune import Answer, Question
from toolkit.plan.tune import tune as answer_to

ConfigLike = RunConfig | Mapping[str, Any] | str | PathLike[str]


def estimate(
    config: ConfigLike,
    hardware: str,
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    hardware_file: Path | None = None,
    calibration: Path | None = None,
) -> dict[str, Any]:
    """How much memory a run needs and how long a step takes, without a GPU: what `toolkit estimate
    --json` prints.

    hardware: `GPU:PER_NODExNODES`, such as "h100-80gb:8x4". Raises LayoutError for a layout that
    could not be trained there.
    """
    return estimate_json(
        with_vocabulary(as_config(config, overrides)), parse_hardware(hardware, extra=hardware_file), calibrated=calibration
    )


def tune(
    config: ConfigLike,
    hardware: str,
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    fix: Sequence[str] = (),
    objective: Objective = "tokens/s",
    max_gpus: int | None = None,
    top: int = 10,
    hardware_file: Path | None = None,
    calibration: Path | None = None,
) -> Answer:
    """Choose layout, ZeRO, offload, recompute and micro-batch for a cluster, as `toolkit tune`
    does.

    fix: axes to hold, such as "parallel.tp=2"; one that an override sets is held too. The answer's
    config is the run as it is best laid out, for a Trainer on answer.best.gpus ranks;
    answer.result.plans are the best `top` plans. Raises LayoutError where nothing fits.
    """
    held = [f"{key}={value}" for key, value in overrides.items()] if isinstance(overrides, Mapping) else overrides
    question = make_question(
        as_config(config, overrides), hardware, fix=[*filter(is_axis, held), *fix], hardware_file=hardware_file, calibration=calibration
    )
    question.objective, question.max_gpus = objective, max_gpus
    return answer_to(question, top=top, what_if=False)


def make_question(
    config: RunConfig, hardware: str, *, fix: Sequence[str], hardware_file: Path | None, calibration: Path | None
) -> Question:
    """The question for tune() from names and files."""
    cluster = measured(parse_hardware(hardware, extra=hardware_file), calibration)
    return Question(
        config=with_vocabulary(config),
        hardware=cluster,
        fixed=parse_fixes(fix),
        limits=Limits(steps=config.train.steps),
        scale=scale_for(cluster.gpu, config.train.precision, users_file=calibration),
    )
