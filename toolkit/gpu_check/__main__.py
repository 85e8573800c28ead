"""`python -m toolkit.gpu_check`: what nothing but a GPU can show, unattended, onto one page.
toolkit.gpu_check.command has its options.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    try:
        from toolkit.errors import ToolkitError
        from toolkit.gpu_check.command import main
    except ModuleNotFoundError as missing:
        sys.stderr.write(f"error: the package {missing.name} is not installed. See docs/gpu-check.md: make gpu-check WHEELS=FOLDER.\n")
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with its workers, instead of before them
    try:
        code = main(sys.argv[1:])
    except ToolkitError as error:
        sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    sys.stdout.flush()
    sys.exit(code)
