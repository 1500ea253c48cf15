"""What storms share: waves of requests against a real server beside a neighbour with small requests, and their results.

A wave passes if each of its requests ended once, in a way that the wave allows. It knows no particular attack.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from tests.e2e.live import Live, serving

ANSWER_SECONDS = 120.0  # seconds for one answer
ANSWERED, REFUSED, FAILED, LEFT, LOST = "answered", "refused", "failed", "left", "lost"
ENDS = (ANSWERED, REFUSED, FAILED, LEFT, LOST)
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
SMALL = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "num_experts": 1, "stream": True}
SETTLED = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTED = ("request_success_total", "requests_failed_total", "requests_aborted_total", "requests_rejected_total")
Attack = Callable[["Storm", int], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Wave:
    """`count` requests, some of them at once. `allowed`: how they may end; `counted`: the server counts each once."""

    name: str
    attack: Attack
    count: int
    at_once: int
    allowed: tuple[str, ...] = (ANSWERED, REFUSED)
    counted: bool = True


@dataclass
class Storm:
    """The results so far."""

    live: Live
    client: httpx.AsyncClient
    ends: dict[str, Counter[str]] = field(default_factory=dict)
    waits: dict[str, list[float]] = field(default_factory=dict)  # by wave: seconds until the neighbour's last byte
    growth: dict[str, int] = field(default_factory=dict)  # by wave: bytes that both processes took
    neighbour: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    wave: str = "quiet"
    over: bool = False

    async def post(self, path: str, content: bytes | dict[str, Any], **headers: str) -> str:
        """Send a body and read the whole answer: how it ended."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        sent = {"content-type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
        try:
            answer = await self.client.post(path, content=data, headers=sent)
        except httpx.HTTPError as error:
            self.faults.append(f"{self.wave}: {error!r}")
            return LOST
        return self.end_of(answer.status_code, answer.content)

    def end_of(self, status: int, content: bytes) -> str:
        """How a request ended according to its answer. An answer that is not in OpenAI's shape is a fault."""
        if status == 200:
            return FAILED if b"event: error" in content[-2000:] else ANSWERED
        try:
            shaped = isinstance(json.loads(content)["error"]["message"], str)
        except (ValueError, KeyError, TypeError):
            shaped = False
        if not shaped:
            self.faults.append(f"{self.wave}: {status} {content[:200]!r}")
        return FAILED if status in (500, 504) else REFUSED


async def rage(live: Live, waves: Sequence[Wave], key: str = "") -> Storm:
    """Run the waves one after the other beside the neighbour, which uses `key`; then check what is held and counted."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=live.url, timeout=ANSWER_SECONDS, limits=limits) as client:
        storm, before = Storm(live, client), await asyncio.to_thread(_counted, live)
        beside = [asyncio.create_task(_neighbour(storm, key)), asyncio.create_task(_weigh(storm))]
        await asyncio.sleep(2.0)
        for wave in waves:
            await _run(storm, wave)
        storm.over = True
        await asyncio.gather(*beside)
        await asyncio.to_thread(_nothing_left, storm, waves, before)
    return storm


async def _run(storm: Storm, wave: Wave) -> None:
    storm.wave = wave.name
    ends = storm.ends.setdefault(wave.name, Counter())
    places = asyncio.Semaphore(wave.at_once)

    async def one(number: int) -> None:
        async with places:
            ends[await wave.attack(storm, number)] += 1

    for fault in await asyncio.gather(*(one(i) for i in range(wave.count)), return_exceptions=True):
        if fault is not None:
            ends[LOST] += 1
            storm.faults.append(f"{wave.name}: {fault!r}")
    if wrong := {end: count for end, count in ends.items() if end not in wave.allowed}:
        storm.faults.append(f"{wave.name}: {wrong}")


async def _neighbour(storm: Storm, key: str) -> None:
    """One small stream after the other, on connections of its own."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=storm.live.url, timeout=ANSWER_SECONDS, headers=headers) as client:
        while not storm.over:
            wave, started = storm.wave, time.monotonic()
            end = LOST
            with suppress(httpx.HTTPError):
                answer = await client.post(COMPLETIONS, json=SMALL)
                end = storm.end_of(answer.status_code, answer.content)
            storm.neighbour[end] += 1
            storm.waits.setdefault(wave, []).append(time.monotonic() - started)
            await asyncio.sleep(0.05)


async def _weigh(storm: Storm) -> None:
    """The memory of the server and its children over what it was before the wave."""
    before: dict[str, int] = {}
    while not storm.over:
        now = memory(storm.live)
        first = before.setdefault(storm.wave, now)
        storm.growth[storm.wave] = max(storm.growth.get(storm.wave, 0), now - first)
        await asyncio.sleep(0.1)


def memory(live: Live) -> int:
    """Bytes that the server's processes have in memory."""
    total = 0
    own = psutil.Process(live.process.pid)
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):  # the process has just ended
            total += process.memory_info().rss
    return total


def _counted(live: Live) -> float:
    return sum(live.metric(name) for name in COUNTED)


def _nothing_left(storm: Storm, waves: Sequence[Wave], before: float) -> None:
    live = storm.live
    storm.faults += [f"{gauge} is {live.metric(gauge)} at the end" for gauge in SETTLED if not live.settles(gauge, 0)]
    sent = sum(storm.ends[wave.name].total() for wave in waves if wave.counted)
    sent += storm.neighbour.total()
    if all(wave.counted for wave in waves) and _counted(live) - before != sent:
        storm.faults.append(f"{sent} requests were sent, the server counted {_counted(live) - before:g}")
    if storm.neighbour[LOST] or storm.neighbour[FAILED]:
        storm.faults.append(f"the neighbour: {dict(storm.neighbour)}")


def figures(storm: Storm) -> dict[str, Any]:
    """The outcome as plain numbers; times in seconds, memory in MiB."""
    rows = {}
    for wave in ("quiet", *storm.ends):
        ends, waits = storm.ends.get(wave, Counter()), storm.waits.get(wave, [0.0])
        rows[wave] = {
            "sent": ends.total(),
            **{end: ends[end] for end in ENDS},
            "neighbour_median": round(statistics.median(waits), 3),
            "neighbour_worst": round(max(waits), 3),
            "growth": storm.growth.get(wave, 0) >> 20,
        }
    return {"waves": rows, "neighbour": dict(storm.neighbour), "faults": len(storm.faults)}


def table(result: dict[str, Any]) -> str:
    """The figures as a table."""
    columns = ("sent", *ENDS, "neighbour_median", "neighbour_worst", "growth")
    rows = [f"| wave | {' | '.join(name.replace('_', ' ') for name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    rows += [f"| {wave} | {' | '.join(str(row[name]) for name in columns)} |" for wave, row in result["waves"].items()]
    return "\n".join(rows)


def main(description: str, waves: Sequence[Wave], *flags: str, key: str = "") -> int:
    """Start a server, run all waves or those that are named, print the table and one line of JSON. `key`: the
    neighbour's, where there are keys."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("waves", nargs="*", help=", ".join(wave.name for wave in waves))
    options = parser.parse_args()
    chosen = [wave for wave in waves if not options.waves or wave.name in options.waves]
    with serving("--log-level", "error", *flags, watched=False) as live:
        storm = asyncio.run(rage(live, chosen, key))
    result = figures(storm)
    print("\n".join([table(result), *storm.faults[:20], json.dumps(result)]))
    return int(bool(storm.faults))
