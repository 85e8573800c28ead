"""Secrets of the environment stay out of what is written: logs, saved configs, error messages.

A variable is a secret by its name: HF_TOKEN, WANDB_API_KEY, PGPASSWORD. Where its value stands in a
text, `<HF_TOKEN>` takes its place.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any

WORDS: tuple[str, ...] = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIALS", "CREDENTIAL")
WORDS += tuple(f"{word}S" for word in WORDS[:4])
MIN_LENGTH = 6  # a shorter value would also be replaced within ordinary words


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is a secret: one of its words ends in TOKEN,
    KEY, SECRET, PASSWORD…
    """
    return any(part.endswith(WORDS) for part in name.upper().split("_"))


def secrets_of(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name of the variable by secret value, longest values first, so that one within another is
    replaced as the whole.
    """
    environ = os.environ if environ is None else environ
    found = {value.strip(): name for name, value in environ.items() if len(value.strip()) >= MIN_LENGTH and is_secret(name)}
    return {value: found[value] for value in sorted(found, key=len, reverse=True)}


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """The text without the values of the environment's secrets."""
    for value, name in secrets_of(environ).items():
        text = text.replace(value, f"<{name}>")
    return text


def redact_values(raw: Any) -> Any:
    """The same for every text within mappings and lists, keys included."""
    secrets = secrets_of()
    return _replaced(raw, secrets) if secrets else raw


def _replaced(raw: Any, secrets: Mapping[str, str]) -> Any:
    if isinstance(raw, str):
        for value, name in secrets.items():
            raw = raw.replace(value, f"<{name}>")
        return raw
    if isinstance(raw, Mapping):
        return {_replaced(key, secrets): _replaced(value, secrets) for key, value in raw.items()}
    return [_replaced(value, secrets) for value in raw] if isinstance(raw, list | tuple) else raw


class Redacted(logging.Formatter):
    """Another formatter's text without secrets, tracebacks included."""

    def __init__(self, formatter: logging.Formatter | None) -> None:
        super().__init__()
        self.inner = formatter or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return redact(self.inner.format(record))


def hide_secrets() -> None:
    """Keep secrets out of what this process says from here on: the root logger's lines, and the
    traceback of an error nobody catches.
    """
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, Redacted):
            handler.setFormatter(Redacted(handler.formatter))
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _write_traceback


def _write_traceback(kind: Any, error: BaseException, trace: Any) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
