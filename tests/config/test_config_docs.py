"""docs/configuration.md is what the schema says, and each key has a meaning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from toolkit.config.describe import keys
from toolkit.config.schema_docs import schema_markdown

ROOT = Path(__file__).parents[2]


def test_configuration_page_is_up_to_date() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == schema_markdown(), (
        "run: python -m toolkit.config.schema_docs > docs/configuration.md"
    )


def test_every_key_is_described() -> None:
    assert [key for key, field in keys() if not field.description] == []


def test_config_and_rules_import_no_torch() -> None:
    code = (
        "import sys, toolkit.config.load, toolkit.config.schema_docs, toolkit.parallel.rules\n"
        "print([m for m in ('torch', 'deepspeed', 'megatron', 'numpy', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"
