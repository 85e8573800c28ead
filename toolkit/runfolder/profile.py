"""RUN/profile.json: written whole or not at all, and read back with a message for whatever is wrong
with it. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import DataError
from toolkit.files import write_durably

PROFILE = "profile.json"
FORMAT = 1
RANK_KEYS = ("rank", "stage", "memory", "predicted", "memory_over_time", "rss", "seconds", "micro_batch_seconds", "traffic")


def write_profile(run_dir: Path, profile: Mapping[str, Any]) -> Path:
    """Write RUN/profile.json, whole or not at all, and return its path."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / PROFILE
    write_durably(path, json.dumps(profile, allow_nan=False))
    return path


def read_profile(run_dir: Path) -> dict[str, Any] | None:
    """What `toolkit profile` wrote, None where it has not run; raises DataError for a file that is
    damaged or of another version.
    """
    path = run_dir / PROFILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path} cannot be read", why=str(error), fix="Run toolkit profile again.") from None
    try:
        profile = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{path} is damaged", why=f"it is not JSON ({error})", fix="Run toolkit profile again, or remove the file."
        ) from None
    if not isinstance(profile, dict) or profile.get("format") != FORMAT:
        version = profile.get("format") if isinstance(profile, dict) else None
        raise DataError(f"{path} has format {version!r}", why=f"this version reads format {FORMAT}", fix="Run toolkit profile again.")
    missing = [key for key in ("config", "layout", "predicted", "ranks") if not profile.get(key)]
    for rank in profile.get("ranks") or ():
        missing += [f"{key} of a rank" for key in RANK_KEYS if not isinstance(rank, dict) or key not in rank]
    if missing:
        raise DataError(f"{path} lacks {', '.join(dict.fromkeys(missing))}", why="it is damaged", fix="Run toolkit profile again.")
    return profile
