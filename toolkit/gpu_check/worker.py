"""A process that runs checks, one after the other, as its parent names them.

    python -m toolkit.gpu_check.worker FOLDER

FOLDER/setting.json: the Setting. Standard input: the name of a check a line. FOLDER/events.jsonl
gets a line of JSON for each row, and one at a check's end: {"check", "row"} or {"check", "end":
"done" | "skip" | "error", "note"}.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.gpu_check.checks import CHECKS
from toolkit.gpu_check.rows import Row, Skip
from toolkit.gpu_check.setting import Setting
from toolkit.train.program import quiet

SETTING, EVENTS = "setting.json", "events.jsonl"


def main(folder: Path) -> int:
    """Answer every name on standard input; ends with the first check that fails with an error, as
    its process may be of no use.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the parent ends a check that hangs with SIGABRT, for its stacks
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    quiet()
    setting = read_setting(folder)
    checks = {check.name: check for check in CHECKS}
    with (folder / EVENTS).open("a", buffering=1) as events:

        def write(event: Mapping[str, Any]) -> None:
            events.write(json.dumps(event) + "\n")

        for line in sys.stdin:
            name = line.strip()

            def say(row: Row, name: str = name) -> None:
                write({"check": name, "row": row.as_json()})

            try:
                checks[name].run(setting, say)
            except Skip as why:
                write({"check": name, "end": "skip", "note": str(why)})
            except Exception as error:
                text = str(error) if isinstance(error, ToolkitError) else f"{type(error).__name__}: {error}"
                sys.stderr.write(traceback.format_exc())
                write({"check": name, "end": "error", "note": text[:1000], "trace": traceback.format_exc()[-4000:]})
                return 1
            else:
                write({"check": name, "end": "done", "note": ""})
    return 0


def write_setting(setting: Setting) -> None:
    values = {"device": setting.device, "quick": setting.quick, "rehearsed": str(setting.rehearsed) if setting.rehearsed else None}
    (setting.folder / SETTING).write_text(json.dumps(values))


def read_setting(folder: Path) -> Setting:
    values = json.loads((folder / SETTING).read_text())
    rehearsed = values.pop("rehearsed")
    return Setting(folder=folder, rehearsed=Path(rehearsed) if rehearsed else None, **values)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.exit(code)
