"""A storm of connections: floods of them, heads and bodies that never end or are too large, bytes that are no HTTP.

`python -m tests.storms.connections` prints a table and one line of JSON, and fails unless each connection was answered
or closed by its client, memory stayed within what the limits allow, and a neighbour's requests went on.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from tests.e2e.live import Live, serving

MB = 1 << 20
BODIES = 32 * MB  # that the server holds together
CONNECTIONS = 128
FLAGS = ("--log-level", "error", "--max-connections", str(CONNECTIONS), "--max-inflight-body-bytes", str(BODIES))
TIMES = ("--header-timeout", "5", "--body-timeout", "6")
ALLOWED = BODIES + CONNECTIONS * 200_000 + 60 * MB  # bodies, heads and buffers, and what the process keeps of its own
ANSWER_SECONDS = 60.0  # seconds for an answer
BODY = b'{"prompt": "Once upon a time", "max_tokens": 16, "num_experts": 1, "stream": true}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
LEFT = "left"
GARBAGE = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /live HTTP/1.1\r\nno colon\r\n\r\n",
    HEAD + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
    HEAD + b"transfer-encoding: chunked\r\n\r\nwat\r\n",
    HEAD + b"x-long: " + b"x" * 70_000 + b"\r\n\r\n",
)
Caller = Callable[["Storm", int], Awaitable[str]]


@dataclass
class Storm:
    """The results so far."""

    live: Live
    ends: dict[str, Counter[str]] = field(
        default_factory=dict
    )  # by wave: connections by status, or how else they ended
    waits: list[float] = field(default_factory=list)  # seconds of a neighbour's requests
    neighbour: Counter[str] = field(default_factory=Counter)
    peak: int = 0  # bytes that memory grew by
    over: bool = False

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        address = urlsplit(self.live.url)
        return await asyncio.open_connection(address.hostname, address.port)


async def _exchange(storm: Storm, *parts: bytes, pause: float = 0.0) -> str:
    """Send the parts, then read to the end: the status of the answer."""
    reader, writer = await storm.connect()
    with suppress(ConnectionError):  # an answer may be there nevertheless
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
    try:
        answer = await asyncio.wait_for(reader.read(), ANSWER_SECONDS)
        return answer.split(b" ", 2)[1].decode() if answer else "nothing"
    finally:
        writer.close()


async def small(storm: Storm, number: int) -> str:
    return await _exchange(storm, HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY)


async def half_a_body(storm: Storm, number: int) -> str:
    return await _exchange(storm, HEAD + b"content-length: 8000000\r\n\r\n", b" " * 7_000_000)


async def slow_head(storm: Storm, number: int) -> str:
    return await _exchange(storm, *[HEAD[i : i + 1] for i in range(25)], pause=0.4)


async def too_large(storm: Storm, number: int) -> str:
    return await _exchange(storm, HEAD + b"content-length: 10000000\r\n\r\n", b" " * 10_000_000)


async def garbage(storm: Storm, number: int) -> str:
    return await _exchange(storm, GARBAGE[number % len(GARBAGE)])


async def leave(storm: Storm, number: int) -> str:
    """Hang up after the first bytes of the answer."""
    reader, writer = await storm.connect()
    writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
    first = await asyncio.wait_for(reader.read(1000), ANSWER_SECONDS)
    writer.close()
    status = first.split(b" ", 2)[1].decode()
    return LEFT if status == "200" else status


# how many connections at once, and what may come of them
WAVES: dict[Caller, tuple[int, set[str]]] = {
    small: (1000, {"200", "503"}),
    half_a_body: (60, {"408", "503"}),
    slow_head: (100, {"408", "503"}),
    too_large: (30, {"413"}),
    garbage: (100, {"400", "431"}),
    leave: (100, {LEFT, "503"}),
}


async def run(live: Live, rounds: int) -> Storm:
    """Every wave, `rounds` times, beside one neighbour who asks one thing after the other."""
    storm = Storm(live)
    beside = [asyncio.create_task(_ask(storm)), asyncio.create_task(_weigh(storm))]
    for _ in range(rounds):
        for caller, (count, _) in WAVES.items():
            ends = storm.ends.setdefault(caller.__name__, Counter())
            for end in await asyncio.gather(*(caller(storm, i) for i in range(count)), return_exceptions=True):
                ends[end if isinstance(end, str) else type(end).__name__] += 1
    storm.over = True
    await asyncio.gather(*beside)
    return storm


async def _ask(storm: Storm) -> None:
    """A neighbour with a connection of its own, which it keeps."""
    body = {"prompt": "Once upon a time", "max_tokens": 1, "num_experts": 1}
    async with httpx.AsyncClient(base_url=storm.live.url, timeout=ANSWER_SECONDS) as client:
        while not storm.over:
            started = time.monotonic()
            storm.neighbour[str((await client.post("/v1/completions", json=body)).status_code)] += 1
            storm.waits.append(time.monotonic() - started)
            await asyncio.sleep(0.02)


async def _weigh(storm: Storm) -> None:
    process = psutil.Process(storm.live.process.pid)
    before = process.memory_info().rss
    while not storm.over:
        storm.peak = max(storm.peak, process.memory_info().rss - before)
        await asyncio.sleep(0.02)


def faults(storm: Storm) -> list[str]:
    found = []
    for caller, (_, allowed) in WAVES.items():
        if wrong := {end: count for end, count in storm.ends[caller.__name__].items() if end not in allowed}:
            found.append(f"{caller.__name__}: {wrong}")
    if set(storm.neighbour) - {"200", "503"}:
        found.append(f"the neighbour: {dict(storm.neighbour)}")
    if storm.peak > ALLOWED:
        found.append(f"memory grew by {storm.peak} bytes; the limits allow {ALLOWED}")
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "http_body_bytes"):
        if not storm.live.settles(gauge, 0.0):
            found.append(f"{gauge} is {storm.live.metric(gauge)} at the end")
    return found


def figures(storm: Storm, seconds: float) -> dict[str, Any]:
    waits = sorted(storm.waits)
    return {
        "waves": {name: dict(ends) for name, ends in storm.ends.items()},
        "neighbour": {**storm.neighbour, "median": round(waits[len(waits) // 2], 3), "worst": round(waits[-1], 3)},
        "memory_mb": round(storm.peak / MB),
        "seconds": round(seconds),
    }


def table(result: dict[str, Any]) -> str:
    rows = ["| wave | connections | ends |", "|---|---|---|"]
    for name, ends in result["waves"].items():
        shown = ", ".join(f"{count} × {end}" for end, count in sorted(ends.items()))
        rows.append(f"| {name.replace('_', ' ')} | {sum(ends.values())} | {shown} |")
    neighbour = result["neighbour"]
    rows += ["", f"A neighbour waited {neighbour['median']} s (median), {neighbour['worst']} s (worst)."]
    return "\n".join([*rows, f"The HTTP process grew by {result['memory_mb']} MB."])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args(arguments)
    with serving(*FLAGS, *TIMES, watched=False) as live:
        started = time.monotonic()
        storm = asyncio.run(run(live, options.rounds))
        wrong = faults(storm)
    result = figures(storm, time.monotonic() - started)
    print("\n".join([table(result), *wrong, json.dumps(result)]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
