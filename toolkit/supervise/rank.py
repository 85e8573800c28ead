"""`python -m toolkit.supervise.rank CONFIG [key=value…]`: one rank of an elastic run, which ends
with the agent that started it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from toolkit.cluster.rank import run_as_rank

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(arguments: list[str]) -> int:
    """Train as `python -m toolkit.train` does."""
    agent = os.getppid()
    if sys.platform == "linux":
        # an agent that is killed cannot tell its ranks, and they would keep the other hosts waiting
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent:
        return 1
    from toolkit.train.__main__ import main as train

    return train(arguments)


if __name__ == "__main__":
    run_as_rank(main, sys.argv[1:])
