"""`toolkit init`: a run's YAML that fits the hardware, from a few answers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from toolkit.config.load import parse_config
from toolkit.config.presets import PRESETS
from toolkit.config.yaml_text import write_yaml
from toolkit.cost.memory import GIB
from toolkit.errors import ConfigError
from toolkit.files import write_durably
from toolkit.hardware.catalogue import Hardware
from toolkit.plan.ask import make_question
from toolkit.plan.search import Plan
from toolkit.plan.space import AXES, spec
from toolkit.plan.tune import tune
from toolkit.plan.write_plan import launch_command

SMALL = "small"
SPARE = 0.1  # of a GPU's memory that a first layout leaves free
MODELS = (SMALL, *PRESETS)
# a Llama that a laptop trains in minutes
SHAPE = {
    "family": "llama",
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 384,
    "max_position_embeddings": 256,
    "tie_embeddings": True,
}


def run_sections(*, model: str, source: str, tokenizer: str | None, name: str, steps: int, accelerator: bool) -> dict[str, Any]:
    """The sections of a run as a person would begin it; the layout is not among them. Raises ConfigError for an unknown model."""
    if model not in MODELS:
        parse_config({"model": {"preset": model}})  # says which presets there are
    small = model == SMALL
    batch, longest = (16, 128) if small else (64 if accelerator else 8, 2048)
    shape: dict[str, Any] = dict(SHAPE) if small else {"preset": model}
    positions = parse_config({"model": shape}).model.max_position_embeddings
    raw: dict[str, Any] = {
        "run": {"dir": f"runs/{name}"},
        "model": shape,
        "train": {
            "steps": steps,
            "global_batch_size": batch,
            "seq_length": min(positions, longest),
            "precision": "bf16" if accelerator else "fp32",
        },
        "optimizer": {"lr": 3e-3 if small else 3e-4, "min_lr": 3e-4 if small else 3e-5, "warmup_steps": steps // 20},
        "data": {"source": source},
        "checkpoint": {"every": max(1, steps // 5)},
    }
    if tokenizer is not None:
        raw["data"]["tokenizer"] = tokenizer
    return raw


def write_config(out: Path, raw: dict[str, Any], hardware: Hardware) -> tuple[Plan, str]:
    """Choose the layout, write the YAML, and return the plan with the command that starts it.

    Raises LayoutError where the model fits in no layout on the hardware, ConfigError where OUT exists or cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} exists", why="init never writes over a file", fix="Name another one, or remove it.")
    question = make_question(parse_config(raw), str(hardware), fix=(), hardware_file=None, calibration=None)
    if hardware.gpu.accelerator:
        question.limits.headroom = SPARE * hardware.gpu.memory_gib * GIB
    best = tune(question, top=1, what_if=False).best
    for axis, (dotted, _) in AXES.items():
        if dotted is not None:
            section, key = dotted.split(".")
            value, default = getattr(best.workload, axis), getattr(getattr(question.config, section), key)
            if value != default or key == "stage":
                raw.setdefault(section, {})[key] = value
    command = launch_command(shlex.quote(str(out)), hardware, best.gpus)
    head = f"# Written by toolkit init for {spec(hardware, best.gpus)}. Start it with:\n#   {command}\n"
    order = ("run", "model", "parallel", "zero", "train", "optimizer", "data", "checkpoint")
    text = head + write_yaml({section: raw[section] for section in order if section in raw})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(out, text)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written", why=error.strerror or str(error), fix="Name another place.") from None
    return best, command
