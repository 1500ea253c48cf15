"""Sends the requests of a plan and collects their outcomes. It uses one event loop. Not here: statistics."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from terminal.bench.outcome import Recorder, RequestOutcome
from terminal.bench.plan import PlannedRequest
from terminal.connection import PATHS, client_options, httpx_errors, refusal
from terminal.errors import TerminalError, Unreachable

JsonObject = Mapping[str, Any]


@dataclass(slots=True)
class RunResult:
    """The outcomes so far. `unfinished`: requests that had not ended when Ctrl-C stopped the run."""

    outcomes: list[RequestOutcome] = field(default_factory=list)
    seconds: float = 0.0
    busy: float = 0.0  # share of one core that this process used
    unfinished: int = 0


@dataclass(frozen=True, slots=True)
class LoadGenerator:
    """Runs plans against one server.

    `concurrency` is for requests without a planned arrival; `timeout`, in seconds, is for a whole request.
    """

    url: str
    key: str
    endpoint: str
    timeout: float
    concurrency: int

    def run(
        self, requests: Sequence[PlannedRequest], bodies: Sequence[JsonObject], on_end: Callable[[], None]
    ) -> RunResult:
        """Send all requests and wait for their ends, or for Ctrl-C. A request that fails is an outcome as well."""
        result = RunResult()
        with suppress(KeyboardInterrupt):
            asyncio.run(self._run(result, requests, [orjson.dumps(body) for body in bodies], on_end))
        result.unfinished = len(requests) - len(result.outcomes)
        return result

    async def _run(
        self, result: RunResult, requests: Sequence[PlannedRequest], bodies: Sequence[bytes], on_end: Callable[[], None]
    ) -> None:
        start, used = time.perf_counter(), time.process_time()
        try:
            await self._send_all(result.outcomes, start, requests, bodies, on_end)
        finally:
            result.seconds = time.perf_counter() - start
            result.busy = (time.process_time() - used) / result.seconds

    async def _send_all(
        self,
        outcomes: list[RequestOutcome],
        start: float,
        requests: Sequence[PlannedRequest],
        bodies: Sequence[bytes],
        on_end: Callable[[], None],
    ) -> None:

        async def send(request: PlannedRequest, body: bytes) -> None:
            elapsed = time.perf_counter() - start
            late = 0.0 if request.at is None else max(0.0, elapsed - request.at)
            outcomes.append(await self._send(client, Recorder(request, late), body))
            on_end()

        async with httpx.AsyncClient(**client_options(self.url, self.key, self.timeout)) as client:
            remaining = iter(zip(requests, bodies, strict=True))
            async with asyncio.TaskGroup() as group:
                if requests and requests[0].at is not None:
                    for request, body in remaining:
                        await asyncio.sleep(max(0.0, start + (request.at or 0.0) - time.perf_counter()))
                        group.create_task(send(request, body))
                else:
                    for _ in range(min(self.concurrency, len(requests))):
                        group.create_task(_work(remaining, send))

    async def _send(self, client: httpx.AsyncClient, recorder: Recorder, body: bytes) -> RequestOutcome:
        loop = asyncio.get_running_loop()
        try:
            with httpx_errors(self.url):
                async with (
                    asyncio.timeout(self.timeout),
                    client.stream("POST", PATHS[self.endpoint], content=body) as response,
                ):
                    if response.status_code != 200:
                        await response.aread()
                        raise refusal(response)
                    async for data in response.aiter_raw():
                        recorder.feed(data)
                        loop.call_soon(
                            recorder.end_read
                        )  # the parts of one read arrive within one iteration of the loop
            return recorder.finish()
        except TimeoutError:
            return recorder.failed(Unreachable(f"no answer within {self.timeout:g} s", "timeout"))
        except TerminalError as error:
            return recorder.failed(error)


async def _work(remaining: Any, send: Any) -> None:
    """One of `concurrency` workers: sends the next request as soon as its last has ended."""
    for request, body in remaining:
        await send(request, body)
