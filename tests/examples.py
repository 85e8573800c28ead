"""How many examples the largest tests of properties draw: all with --all-cells, a third in other runs."""

from __future__ import annotations

ALL = False  # set by tests/conftest.py before any test is imported


def examples(count: int) -> int:
    """What `max_examples` is, where `count` are drawn by `make test-all`."""
    return count if ALL else count // 3
