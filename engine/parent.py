"""Ties a child process to its parent: it ends with the parent, and ignores signals sent to the whole process group."""

import ctypes
import signal
import sys

DUMP_SIGNAL = signal.SIGUSR1  # from the parent: write the stack trace of each thread

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """End this process when its parent ends, and ignore SIGINT and SIGTERM: the parent decides what they mean."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform != "linux":
        return  # the closed socket or pipe ends this process as well, only later: between two steps
    # For a parent killed during a step; if it ended before this line, its end of the socket is closed as well.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
