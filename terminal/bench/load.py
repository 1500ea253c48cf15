"""Sends the requests of a plan and collects what each came to. It knows one event loop, and no statistics."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from terminal.bench.outcome import Outcome, Recorder
from terminal.bench.plan import Job
from terminal.connection import PATHS, client_options, refusal, translated
from terminal.errors import TerminalError, Unreachable

Body = Mapping[str, Any]


@dataclass(slots=True)
class Run:
    """What has been measured; it grows while requests end. `unfinished`: sent or planned, when Ctrl-C stopped it."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    busy: float = 0.0  # share of one core that this process used
    unfinished: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """`concurrency` matters to jobs without a planned arrival; `timeout` in seconds is a request's whole life."""

    url: str
    key: str
    endpoint: str
    timeout: float
    concurrency: int

    def run(self, jobs: Sequence[Job], bodies: Sequence[Body], on_end: Callable[[], None]) -> Run:
        """All of them, to their end, or to Ctrl-C. A request that fails is an outcome, too."""
        found = Run()
        with suppress(KeyboardInterrupt):
            asyncio.run(self._run(found, jobs, [orjson.dumps(body) for body in bodies], on_end))
        found.unfinished = len(jobs) - len(found.outcomes)
        return found

    async def _run(self, found: Run, jobs: Sequence[Job], bodies: Sequence[bytes], on_end: Callable[[], None]) -> None:
        start, used = time.perf_counter(), time.process_time()
        try:
            await self._send_all(found.outcomes, start, jobs, bodies, on_end)
        finally:
            found.seconds = time.perf_counter() - start
            found.busy = (time.process_time() - used) / found.seconds

    async def _send_all(
        self,
        outcomes: list[Outcome],
        start: float,
        jobs: Sequence[Job],
        bodies: Sequence[bytes],
        on_end: Callable[[], None],
    ) -> None:

        async def send(job: Job, body: bytes) -> None:
            late = 0.0 if job.at is None else max(0.0, time.perf_counter() - start - job.at)
            outcomes.append(await self._ask(client, Recorder(job, late), body))
            on_end()

        async with httpx.AsyncClient(**client_options(self.url, self.key, self.timeout)) as client:
            queue = iter(zip(jobs, bodies, strict=True))
            async with asyncio.TaskGroup() as group:
                if jobs and jobs[0].at is not None:
                    for job, body in queue:
                        await asyncio.sleep(max(0.0, start + (job.at or 0.0) - time.perf_counter()))
                        group.create_task(send(job, body))
                else:
                    for _ in range(min(self.concurrency, len(jobs))):
                        group.create_task(_drain(queue, send))

    async def _ask(self, client: httpx.AsyncClient, recorder: Recorder, body: bytes) -> Outcome:
        loop = asyncio.get_running_loop()
        try:
            with translated(self.url):
                async with (
                    asyncio.timeout(self.timeout),
                    client.stream("POST", PATHS[self.endpoint], content=body) as response,
                ):
                    if response.status_code != 200:
                        await response.aread()
                        raise refusal(response)
                    async for data in response.aiter_raw():
                        recorder.feed(data)
                        loop.call_soon(recorder.end_read)  # pieces of one read follow each other before the loop turns
            return recorder.finish()
        except TimeoutError:
            return recorder.failed(Unreachable(f"no answer within {self.timeout:g} s", "timeout"))
        except TerminalError as error:
            return recorder.failed(error)


async def _drain(queue: Any, send: Any) -> None:
    """One of `concurrency` workers: the next job as soon as the last has ended."""
    for job, body in queue:
        await send(job, body)
