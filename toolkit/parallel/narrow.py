"""The table of rules for a search that changes only some attributes of a case: which rules each of them can break."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from toolkit.parallel.case import Case
from toolkit.parallel.table import RULES

Broken = Callable[[Case], bool]
_FIELDS = frozenset(f.name for f in fields(Case))


def rules_by_group(groups: Mapping[str, Sequence[str]]) -> dict[frozenset[str], list[Broken]]:
    """The rules' conditions by the groups of attributes that they look at, in the table's order.

    groups: attributes of a Case by a name. Conditions that look at none of them are under the empty set.
    """
    found: dict[frozenset[str], list[Broken]] = {}
    for rule in RULES:
        read = attributes_read(rule.broken)
        key = frozenset(name for name, attributes in groups.items() if not read.isdisjoint(attributes))
        found.setdefault(key, []).append(rule.broken)
    return found


@lru_cache(maxsize=256)
def attributes_read(broken: Broken) -> frozenset[str]:
    """Fields of a Case that a condition may look at, itself or through what it calls.

    They are found in its code, not by running it: a branch that is not taken today counts too.
    """
    return _FIELDS & frozenset(_names(broken, set()))


def _names(function: Any, seen: set[Any]) -> Iterator[str]:
    """Every name in the code of a function, and in that of functions and of a Case's methods and properties under those names."""
    if not isinstance(function, FunctionType) or function in seen:
        return
    seen.add(function)
    for cell in function.__closure__ or ():  # an attribute's name, as in getattr(case, name), or a function
        if isinstance(cell.cell_contents, str):
            yield cell.cell_contents
        yield from _names(cell.cell_contents, seen)
    for name in _code_names(function.__code__):
        yield name
        member = getattr(Case, name, None)
        for called in (member.fget if isinstance(member, property) else member, function.__globals__.get(name)):
            yield from _names(called, seen)


def _code_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_names(constant)
        elif isinstance(constant, str):
            yield constant
