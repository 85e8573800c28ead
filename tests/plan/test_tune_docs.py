"""What docs/tune.md tells a user to run, runs and says what the page promises."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from toolkit.cli import app
from toolkit.plan.space import AXES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tune.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines() if "launch/recipes" in line]


@pytest.mark.parametrize("command", COMMANDS, ids=[str(i) for i in range(len(COMMANDS))])
def test_command_of_the_page(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [word.replace("runs/plan", str(tmp_path / "plan")) for word in shlex.split(command)]
    done = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    if "--json" in words:
        assert {plan["layout"]["dp"] for plan in json.loads(done.stdout)["plans"]} == {8}
    if "--out" in words:
        assert {p.name for p in (tmp_path / "plan").iterdir()} == {"run.yaml", "ds_config.json", "launch.sh", "tune.json"}


def test_the_page_has_commands_and_names_what_is_there() -> None:
    assert len(COMMANDS) >= 3
    usage = CliRunner().invoke(app, ["tune", "--help"], env={"COLUMNS": "240", "TERM": "dumb", "NO_COLOR": "1"}).output
    for option in set(re.findall(r"`(--[a-z-]+)", PAGE)):
        assert option in usage, option
    for axis in ("dp", "zero", "recompute"):
        assert axis in AXES
