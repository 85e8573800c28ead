"""What every helper process needs: to end when the process that started it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, of the given process id, is gone (Linux; elsewhere nothing).

    A killed parent cannot tell its helpers, and a helper that holds its sockets keeps other ranks waiting.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the line above.
    if os.getppid() != parent:
        os._exit(1)
