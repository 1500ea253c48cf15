"""Sends the requests of a plan and collects what each came to. It knows one event loop, and no statistics."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from terminal.bench.outcome import Outcome, Recorder
from terminal.bench.plan import Job
from terminal.connection import PATHS, client_options, refusal, translated
from terminal.errors import TerminalError, Unreachable

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    outcomes: list[Outcome]
    seconds: float
    busy: float  # share of one core that this process used


@dataclass(frozen=True, slots=True)
class Load:
    """`concurrency` matters to jobs without a planned arrival; `timeout` in seconds is a request's whole life."""

    url: str
    key: str
    endpoint: str
    timeout: float
    concurrency: int

    def run(self, jobs: Sequence[Job], bodies: Sequence[Body], on_end: Callable[[], None]) -> Run:
        """All of them, to their end. A request that fails is an outcome, too."""
        return asyncio.run(self._run(jobs, [orjson.dumps(body) for body in bodies], on_end))

    async def _run(self, jobs: Sequence[Job], bodies: Sequence[bytes], on_end: Callable[[], None]) -> Run:
        outcomes: list[Outcome] = []
        start, used = time.perf_counter(), time.process_time()

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
            seconds = time.perf_counter() - start
            return Run(outcomes, seconds, (time.process_time() - used) / seconds)

    async def _ask(self, client: httpx.AsyncClient, recorder: Recorder, body: bytes) -> Outcome:
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
            return recorder.finish()
        except TimeoutError:
            return recorder.failed(Unreachable(f"no answer within {self.timeout:g} s", "timeout"))
        except TerminalError as error:
            return recorder.failed(error)


async def _drain(queue: Any, send: Any) -> None:
    """One of `concurrency` workers: the next job as soon as the last has ended."""
    for job, body in queue:
        await send(job, body)
