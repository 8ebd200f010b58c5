"""Run a command that ends when its parent does: `python child.py PARENT NICENESS COMMAND…`.

On Linux the kernel is asked to tell the command when the process that started it dies, so
that not even a killed demo leaves a coordinator behind.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Tie this process to its parent, lower its priority, and become the command."""
    parent, niceness, command = int(arguments[0]), int(arguments[1]), arguments[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the demo has ended")
    os.nice(niceness)
    os.execv(command[0], command)  # noqa: S606 - the demo's own commands


if __name__ == "__main__":
    main(sys.argv[1:])
