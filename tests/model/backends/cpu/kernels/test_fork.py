"""A process that forks while another of its threads is in an op."""

import os
import signal
import threading
import warnings
from collections.abc import Callable

import torch

from tests.model.backends.cpu.kernels.cases import Make, linear_case


def status_of_child(check: Callable[[], bool]) -> int:
    """How a forked child ends that runs a check: 0 where it holds. It is killed where it takes long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks of processes with several threads
        child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(5)
        os._exit(0 if check() else 1)
    return os.waitpid(child, 0)[1]


def test_a_child_computes_whatever_its_parent_was_at() -> None:
    """A fork waits for the op that runs: a child would wait forever for a thread that it has not. About every second of
    the forks meets an op."""
    make = Make(1)
    large, small = linear_case(make, 200, 700, 900, "float"), linear_case(make, 2, 16, 20, "float")
    every, rows = torch.arange(200), torch.arange(2)
    expected, began, ended = small.run(rows), threading.Event(), threading.Event()

    def work() -> None:
        while not ended.is_set():
            large.run(every)
            began.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert began.wait(60)
        assert not any(status_of_child(lambda: torch.equal(small.run(rows), expected)) for _ in range(12))
    finally:
        ended.set()
        thread.join()
