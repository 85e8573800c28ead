"""What a key accepts, in words: shared by the error messages and the generated key table."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from toolkit.config.schema import RunConfig

_NAMES: dict[Any, tuple[str, str]] = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "switches"),
    str: ("a string", "strings"),
    Path: ("a path", "paths"),
    Any: ("a value", "values"),
}
_BOUNDS = ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))


def show(value: object) -> str:
    """Render a value as a config file would hold it, never longer than a line and never failing."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"{{a mapping of {len(value)} keys}}"
    if isinstance(value, (list, tuple)):
        if len(value) <= 4 and not any(isinstance(v, (dict, list, tuple)) for v in value):
            return "[" + ", ".join(show(v) for v in value) + "]"
        return f"[a list of {len(value)} values]"
    most = 80
    if isinstance(value, Path):
        value, most = str(value), 400  # the end of a path says which file it is
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = "(a huge number)"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= most else text[: most - 4] + "..."


def expected(field: FieldInfo) -> str:
    """Say which values a key accepts: its type, its bounds or its choices."""
    parts = [a for a in (get_args(field.annotation) if _is_union(field.annotation) else (field.annotation,))]
    optional = type(None) in parts
    text = " or ".join(_name(p) for p in parts if p is not type(None))
    bounds = [f"{sign} {_number(getattr(m, attr))}" for m in field.metadata for kind, attr, sign in _BOUNDS if isinstance(m, kind)]
    return text + (" " + " and ".join(bounds) if bounds else "") + (", or null" if optional else "")


def keys() -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema as section.key, in the order of the file."""
    for section, holder in RunConfig.model_fields.items():
        model = section_model(holder)
        assert model is not None, "RunConfig holds sections only"
        for name, field in model.model_fields.items():
            yield f"{section}.{name}", field


def section_model(field: FieldInfo) -> type[BaseModel] | None:
    """The pydantic model a field holds, if it holds one."""
    for part in get_args(field.annotation) if _is_union(field.annotation) else (field.annotation,):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def field_at(path: tuple[str | int, ...]) -> FieldInfo | None:
    """The field at a path such as ("train", "steps"), or None where the schema knows none."""
    model: type[BaseModel] | None = RunConfig
    field: FieldInfo | None = None
    for part in path:
        if model is None or part not in model.model_fields:
            return None
        field = model.model_fields[str(part)]
        model = section_model(field)
    return field


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(str(a) for a in args[:-1]) + f" or {args[-1]}"
    if origin is tuple:
        return f"a list of {len(args)} {_NAMES[args[0]][1]}"
    if origin is dict:
        return f"a mapping of {_NAMES[args[0]][1]} to {_NAMES[args[1]][1]}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping"
    return _NAMES[annotation][0]


def _number(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
