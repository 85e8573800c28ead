"""What a rule is: both tables, of training and of generating, are made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from toolkit.parallel.options import Option

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class Rule(Generic[C]):
    """One thing every legal run satisfies: when it is broken, how to say so, and settings that may
    mend it, nearest first.

    C is what it looks at: a Case of training, or a GenerationCase.
    """

    id: str
    title: str
    why: str
    broken: Callable[[C], bool]
    what: Callable[[C], str]
    options: Callable[[C], Iterator[Option]]
    hint: str = ""
