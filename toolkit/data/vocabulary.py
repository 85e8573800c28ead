"""The vocabulary that prepared data decides, read without numpy or torch: for what plans a run and
does not start it.
"""

from __future__ import annotations

import json
from pathlib import Path

from toolkit.config.schema import RunConfig

SUFFIX = ".manifest.json"


def with_vocabulary(config: RunConfig) -> RunConfig:
    """The config with model.vocab_size taken from its prepared data, as training takes it; as it is
    where that says nothing.
    """
    if config.model.vocab_size is not None:
        return config
    names = list(config.data.blend or ()) or [config.data.source or ""]
    sizes = [_vocabulary(name) for name in names]
    if not all(sizes):
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": max(filter(None, sizes))})})


def _vocabulary(name: str) -> int | None:
    """Token ids of a prepared prefix; None where there is no such prefix, or its manifest cannot be
    read (training says why).
    """
    prefix = name.removesuffix(".bin").removesuffix(".idx")
    try:
        return int(json.loads(Path(f"{prefix}{SUFFIX}").expanduser().read_bytes())["tokenizer"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
