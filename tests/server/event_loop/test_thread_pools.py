"""Threads for what would hold up the event loop: how many run, how many wait, and what happens to one more."""

import asyncio
import threading

import pytest

from model.errors import EngineBusy
from server.event_loop.thread_pools import BoundedThreadPool


def test_a_job_runs_elsewhere_and_its_result_comes_back() -> None:
    async def body() -> None:
        pool = BoundedThreadPool("sums", threads=1, waiting=0)
        assert await pool.run(lambda a, b: (a + b, threading.current_thread().name.startswith("sums")), 2, b=3) == (
            5,
            True,
        )

    asyncio.run(body())


def test_an_error_of_the_job_is_the_callers() -> None:
    async def body() -> None:
        with pytest.raises(ZeroDivisionError):
            await BoundedThreadPool("divisions", threads=1, waiting=0).run(lambda: 1 // 0)

    asyncio.run(body())


def test_no_more_than_the_limit_are_held_and_a_place_comes_free() -> None:
    async def body() -> None:
        pool, release = BoundedThreadPool("waits", threads=1, waiting=1), threading.Event()
        held = [asyncio.ensure_future(pool.run(release.wait, 10)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy, match="the queue for waits is full: 2 jobs are held"):
            await pool.run(release.wait, 10)
        release.set()
        assert await asyncio.gather(*held) == [True, True]
        assert await pool.run(release.wait, 10)

    asyncio.run(body())
