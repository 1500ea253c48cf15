"""Threads of their own for work that would hold up the event loop, each kind with its own few and a bounded queue.

So that a crowd of one kind neither takes the threads of another nor piles up without end. It knows no work.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from model.errors import EngineBusy

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Lane:
    """`threads` jobs run at a time, and `waiting` more may wait; `work` names them in the refusal of any more."""

    def __init__(self, work: str, threads: int, waiting: int) -> None:
        self._work, self._limit = work, threads + waiting
        self._places = threading.BoundedSemaphore(self._limit)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=work)

    async def run(self, job: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """What the job returns. One whose caller has gone before it began is not run.

        Raises:
            EngineBusy: too many jobs are waiting.
        """
        if not self._places.acquire(blocking=False):
            raise EngineBusy(f"the queue for {self._work} is full: {self._limit} jobs are held; try again later")
        future = self._pool.submit(job, *args, **kwargs)
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)
