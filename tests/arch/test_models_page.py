"""The example of docs/models.md runs and prints what the page says, and its table names every family."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from toolkit.arch.families import FAMILIES

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text()


def test_the_example_runs() -> None:
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    for node, line in ((n, code[1].splitlines()[n.end_lineno - 1]) for n in ast.parse(code[1]).body if n.end_lineno):
        text = ast.unparse(node)
        if isinstance(node, ast.Expr):
            value = eval(text, names)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert shown == line.partition("#")[2].strip()
        else:
            exec(text, names)


def test_every_family_is_listed() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(FAMILIES)
