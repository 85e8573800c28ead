"""`python -m tests.inference.limited FOLDER GIB`: the same tokens with a real limit of memory and
without, in one process.

Prints {"plain_refused": …, "streamed": tokens, "plain": tokens, "memory": …}: the plain model and
the streamed one under the limit, and the plain one once the limit is lifted.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from toolkit.errors import OutOfMemory
from toolkit.inference.request import Request
from toolkit.inference.run import Session

PROMPT = [[72, 101, 108, 108, 111, 32, 119]]
NEW = 2


def generate(folder: str, **more: Any) -> tuple[list[int], dict[str, int]]:
    session = Session(Request(model=folder, prompts=[], tokenizer="bytes", max_new_tokens=NEW, **more))
    try:
        answers = session.generate(PROMPT)
        assert answers is not None
        return answers[0].tokens, session.memory()
    finally:
        session.close()


def main(folder: str, limit: float) -> None:
    found: dict[str, Any] = {}
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        generate(folder, memory_limit=limit)
    except OutOfMemory as error:
        found["plain_refused"] = str(error)
    resource.setrlimit(resource.RLIMIT_DATA, before)
    found["streamed"], found["memory"] = generate(folder, memory_limit=limit, offload="disk")
    resource.setrlimit(resource.RLIMIT_DATA, before)
    found["plain"], _ = generate(folder)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
