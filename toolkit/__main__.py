"""`python -m toolkit`, and the command `toolkit`: Ctrl-C while it is still importing ends it
without a traceback.
"""

from __future__ import annotations

import signal
import threading


def main() -> None:
    """Import the command line and run it."""
    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if here else None
    from toolkit.cli import main as run

    if here:
        signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
