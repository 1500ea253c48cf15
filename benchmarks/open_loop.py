"""Streams over HTTP that begin at given moments, whatever the server does, or one after the other.

It notes when each token came and how each request ended, and knows no server's options.
"""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

DATA, DONE = b"data: ", b"[DONE]"
SECONDS = 300.0  # for one request; beyond it is counted as not answered


@dataclass(slots=True)
class Sent:
    """One request and what came of it; times are of time.monotonic()."""

    at: float  # when it was sent
    status: int = 0  # of HTTP; 0: the connection failed
    tokens: list[float] = field(default_factory=list)  # when each came
    finished: bool = False
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [later - earlier for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)]

    @property
    def wait(self) -> float:
        """Seconds to the first token."""
        return self.tokens[0] - self.at if self.tokens else 0.0


async def send(port: int, body: dict[str, Any]) -> Sent:
    """Send one streamed completion and read it to its end. Nothing is raised."""
    sent = Sent(time.monotonic())
    try:
        async with asyncio.timeout(SECONDS):
            await _stream(port, body, sent)
    except (OSError, TimeoutError, EOFError):
        pass
    return sent


async def _stream(port: int, body: dict[str, Any], sent: Sent) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        content = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(content)}\r\n"
        writer.write(head.encode() + b"connection: close\r\ncontent-type: application/json\r\n\r\n" + content)
        sent.status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if not line.startswith(DATA):
                continue
            now, event = time.monotonic(), line[len(DATA) :].strip()
            if event == DONE:
                sent.finished = True
            elif b'"choices":[]' in event:
                sent.usage = json.loads(event)["usage"]
            elif b'"text":""' not in event and not event.startswith(b'{"error"'):
                sent.tokens.append(now)
    finally:
        writer.close()


def moments(rate: float, seconds: float, seed: int = 1) -> list[float]:
    """The times of a Poisson process of `rate` arrivals per second."""
    chance, found, now = random.Random(seed), [], 0.0
    while (now := now + chance.expovariate(rate)) < seconds:
        found.append(now)
    return found


async def open_loop(port: int, bodies: Callable[[int], dict[str, Any]], times: list[float]) -> list[Sent]:
    """Send request i at `times[i]` seconds from now; returns when all have ended."""
    began = time.monotonic()
    running: list[Awaitable[Sent]] = []
    for number, due in enumerate(times):
        await asyncio.sleep(max(0.0, began + due - time.monotonic()))
        running.append(asyncio.create_task(send(port, bodies(number))))
    return list(await asyncio.gather(*running))


async def closed_loop(port: int, bodies: Callable[[int], dict[str, Any]], clients: int, seconds: float) -> list[Sent]:
    """So many clients, each of which sends its next request when the last one has ended, until the time is over."""
    until, numbers, found = time.monotonic() + seconds, iter(range(10**9)), []

    async def client() -> None:
        while time.monotonic() < until:
            found.append(await send(port, bodies(next(numbers))))

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def queue_length(port: int, every: float, found: list[int]) -> None:
    """Until it is cancelled, append the sequences that wait at the server."""
    name = b"moedial:num_requests_waiting{"
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
        text = await reader.read()
        writer.close()
        lines = [line for line in text.splitlines() if line.startswith(name)]
        found.append(round(float(lines[0].rsplit(b" ", 1)[1])) if lines else 0)
        await asyncio.sleep(every)
