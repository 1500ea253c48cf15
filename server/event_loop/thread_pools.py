"""Bounded thread pools for work that would hold up the event loop, one for each kind of work.

One kind of work can therefore neither use up another's threads nor queue without end.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from model.errors import EngineBusy

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class BoundedThreadPool:
    """Runs `threads` jobs at a time, while `waiting` more may wait. `work` names the jobs in error messages."""

    def __init__(self, work: str, threads: int, waiting: int) -> None:
        self._work, self._limit = work, threads + waiting
        self._slots = threading.BoundedSemaphore(self._limit)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=work)

    async def run(self, job: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """What the job returns. A job that is cancelled before it began is not run.

        Raises:
            EngineBusy: too many jobs are waiting.
        """
        if not self._slots.acquire(blocking=False):
            raise EngineBusy(f"the queue for {self._work} is full: {self._limit} jobs are held; try again later")
        future = self._pool.submit(job, *args, **kwargs)
        future.add_done_callback(lambda _: self._slots.release())
        return await asyncio.wrap_future(future)
