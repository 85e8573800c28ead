"""How `make test` divides the tests between its two processes, which pytest-xdist starts.

The unit is a share: the tests of one file, or of several files that use the same expensive fixture.
A share runs in one process, in its usual order, so module-scoped fixtures are set up once, as in a
run without xdist. Ranks meet at ports or files of their own, so shares need not know of each other.
"""

from __future__ import annotations

from typing import Any

# folders whose files share what takes seconds to set up: two hosts, prepared data, a profiled run,
# a tiny model
TOGETHER = {"cluster": "hosts", "train": "train", "profile": "profile", "report": "profile"}
# the longest first: what is left at the end is short, and the processes end together
FIRST = ("parity/", "train/", "cluster/", "test_readme.py", "profile/", "site/", "checkpoint/", "cost/", "rehearse/", "gpu_check/")


def share(nodeid: str) -> str:
    """The share that a test, named as pytest names it, belongs to."""
    path = nodeid.partition("::")[0].removeprefix("tests/")
    return TOGETHER.get(path.partition("/")[0], path)


def turn(nodeid: str) -> int:
    """When a share's turn comes: the lowest first."""
    path = nodeid.removeprefix("tests/")
    return next((i for i, start in enumerate(FIRST) if path.startswith(start)), len(FIRST))


def scheduler(config: Any, log: Any) -> Any:
    """What gives a process that has next to nothing left the next share, in the order of collection."""
    from xdist.scheduler import LoadScopeScheduling

    class Shares(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return share(nodeid)

    config.option.loadscopereorder = False
    return Shares(config, log)
