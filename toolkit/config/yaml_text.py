"""YAML as this project reads it: PyYAML's safe loader with today's numbers and no duplicate keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from toolkit.config.describe import show
from toolkit.errors import ConfigError

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, 1:30 and dates as text, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _TAG + "merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {show(key.value)} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads 1e-3 as text, 1:30 as ninety and 2024-01-01 as a date: none is what the file's author means
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.removeprefix(_TAG) not in ("float", "int", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "int", re.compile(r"^[-+]?(0x[0-9a-fA-F]+|[0-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"^([-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 16 if "x" in text else 10)  # 010 is ten, not YAML 1.1's eight


_Loader.add_constructor(_TAG + "int", _integer)


def read_yaml(text: str, *, source: str) -> Any:
    """Parse YAML text; raises ConfigError that names source and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise ConfigError(f"{where} is not valid YAML", why=(e.problem or "it cannot be read").strip(), fix="Correct that line.") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{source} is not valid YAML", why=" ".join(str(e).split()), fix="Save it as plain text.") from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply", fix="A config needs no more than a few levels.") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as e:
        # explicit tags such as !!int "" make PyYAML's constructors fail in their own ways
        raise ConfigError(
            f"{source} holds a value its YAML tag does not allow", why=" ".join(str(e).split()), fix="Remove the tag."
        ) from None


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either this loader or a YAML 1.1 reader would take for something other than text."""


_Dumper.yaml_implicit_resolvers = {
    first: _Loader.yaml_implicit_resolvers.get(first, []) + yaml.SafeLoader.yaml_implicit_resolvers.get(first, [])
    for first in _Loader.yaml_implicit_resolvers.keys() | yaml.SafeLoader.yaml_implicit_resolvers.keys()
}


def write_yaml(data: Any) -> str:
    """YAML text that read_yaml() reads back to equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=140)


def read_text(path: Path, *, kind: str) -> str:
    """Read a UTF-8 file; raises ConfigError for a missing file, a folder, bad permissions or
    another encoding.
    """
    name = show(path)
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{kind} {name} does not exist", fix="Check the path.") from None
    except IsADirectoryError:
        raise ConfigError(f"{kind} {name} is a folder", fix="Name a file inside it.") from None
    except UnicodeDecodeError as e:
        raise ConfigError(
            f"{kind} {name} is not UTF-8 text", why=f"byte {e.start} is {e.object[e.start]:#04x}", fix="Save it as UTF-8."
        ) from None
    except (OSError, ValueError) as e:
        why = (e.strerror if isinstance(e, OSError) else None) or str(e)
        raise ConfigError(f"{kind} {name} cannot be read", why=why, fix="Check the path and its permissions.") from None
