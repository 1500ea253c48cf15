"""What every process of ours that is nobody's shell does first: it lives as long as its parent, and no signal ends it.

It knows no engine.
"""

import ctypes
import signal
import sys

DUMP_SIGNAL = signal.SIGUSR1  # from the parent: write where each thread is

_PR_SET_PDEATHSIG = 1


def follow() -> None:
    """Die with the parent, and leave it to the parent to decide what a signal to the whole group means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform != "linux":
        return  # the closed socket or pipe ends us too, only later: between two steps
    # Against a parent killed while we compute; one that died before this line has closed its end as well.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
