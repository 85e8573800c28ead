"""What the tests of the pages run on every rank of the pool's world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.trainer.run import program


def train(argument: dict[str, Any]) -> str:
    """Train argument["config"] with argument["overrides"] in argument["folder"]; what this rank printed."""
    from toolkit import Trainer

    with program(argument["folder"]) as out:
        Trainer(Path(argument["config"]), overrides=argument["overrides"]).fit()
    return out.getvalue()
