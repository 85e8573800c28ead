"""Who may import what: pure rooms stay pure, and deepspeed has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "toolkit"
HEAVY = ("torch", "deepspeed", "megatron", "transformers", "datasets")
PURE = [
    "toolkit.cli",
    "toolkit.config.load",
    "toolkit.config.deepspeed",
    "toolkit.parallel.rules",
    "toolkit.cluster.launch",
    "toolkit.cluster.locks",
    "toolkit.memory.own",
    "toolkit.plan.fitting",
    "toolkit.profile.show",
    "toolkit.report.page",
]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_deepspeed_is_imported_in_one_file() -> None:
    users = {str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if "deepspeed" in _imports(p)}
    assert users == {"engine/zero.py"}


def test_megatron_is_imported_where_it_belongs() -> None:
    rooms = {p.relative_to(ROOT).parts[0] for p in ROOT.rglob("*.py") if "megatron" in _imports(p)}
    assert rooms <= {"model", "parallel", "engine", "data", "train"}


@pytest.mark.parametrize("module", PURE)
def test_pure_rooms_load_without_torch(module: str) -> None:
    code = f"import sys, {module}\nprint(sorted({HEAVY!r} & sys.modules.keys()))".replace(repr(HEAVY), repr(set(HEAVY)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
