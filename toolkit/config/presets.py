"""Published model shapes, by name; a key set beside `model.preset` wins over the preset's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.arch.families import FAMILIES
from toolkit.config.describe import show
from toolkit.config.explain import nearest
from toolkit.errors import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    name: {"family": family.name, **shape} for family in FAMILIES.values() for name, shape in family.presets.items()
}


def with_preset(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model section with its preset's keys below the user's; raises ConfigError for an unknown preset."""
    name = model.get("preset")
    if name is None:
        return dict(model)
    if not isinstance(name, str) or name not in PRESETS:
        near = nearest(str(name).lower(), PRESETS, cutoff=0.5) if isinstance(name, str) else None
        hint = f"Did you mean {near}?" if near else ""
        raise ConfigError(f"model.preset={show(name)} is not a known preset", fix=f"{hint} Presets are {', '.join(PRESETS)}.".strip())
    return {**PRESETS[name], **model}
