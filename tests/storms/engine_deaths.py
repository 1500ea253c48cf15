"""A storm that kills and stops the engine process of a real server again and again, under load.

`python -m tests.storms.engine_deaths --kills 100 --hangs 20` prints a table and one line of JSON, and fails unless HTTP
always answered, every request ended exactly once, answers never changed, and nothing was left behind.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from tests.e2e.live import Live, serving

STREAMS, WHOLES, LEAVERS = 6, 3, 1  # clients that read a stream, that wait for a whole answer, that hang up
PAUSE = 0.05  # seconds between two looks at a probe
RETRY = 0.25  # seconds after a refusal
LIMIT = 60.0  # seconds for the engine to come back
PROMPTS = ("Once upon a time", "The little dog", "One day a girl named", "A big red ball")
ENDS = ("answered", "refused", "failed", "left")


@dataclass
class Storm:
    """The results so far."""

    live: Live
    rng: random.Random
    ends: Counter[str] = field(default_factory=Counter)  # of requests, by how they ended
    faults: list[str] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)  # seconds that /live took
    recoveries: dict[str, list[float]] = field(default_factory=lambda: {"kill": [], "hang": []})
    expected: dict[str, str] = field(default_factory=dict)  # the answer to each prompt
    over: bool = False

    @property
    def sent(self) -> int:
        return self.ends.total()


async def storm(live: Live, kills: int, hangs: int, seed: int) -> Storm:
    """Keep load on the server while its engine dies and hangs that many times, in random order."""
    found = Storm(live, random.Random(seed))
    deaths = ["kill"] * kills + ["hang"] * hangs
    found.rng.shuffle(deaths)
    async with httpx.AsyncClient(base_url=live.url, timeout=httpx.Timeout(120)) as client:
        for prompt in PROMPTS:
            found.expected[prompt] = (await client.post("/v1/completions", json=_body(prompt))).json()["choices"][0][
                "text"
            ]
        found.ends["answered"] += len(PROMPTS)
        kinds = [_stream] * STREAMS + [_whole] * WHOLES + [_leave] * LEAVERS
        tasks = [asyncio.create_task(_client(found, client, kind)) for kind in kinds]
        tasks.append(asyncio.create_task(_probe(found)))
        for death in deaths:
            await _strike(found, client, death)
        found.over = True
        await asyncio.gather(*tasks)
        await _nothing_left(found, client)
    return found


async def _strike(found: Storm, client: httpx.AsyncClient, death: str) -> None:
    """One death among running requests, and the way back."""
    answered = found.ends["answered"]
    while found.ends["answered"] == answered:
        await asyncio.sleep(PAUSE)
    await asyncio.sleep(found.rng.uniform(0, 0.5))
    pid = engine_pid(found.live)
    assert pid is not None, "the engine ended by itself"
    started = time.monotonic()
    os.kill(pid, signal.SIGKILL if death == "kill" else signal.SIGSTOP)
    while engine_pid(found.live) in (None, pid) or (await client.get("/ready")).status_code != 200:
        if time.monotonic() - started > LIMIT:
            found.faults.append(f"after a {death} the engine was not back within {LIMIT:g} s")
            return
        await asyncio.sleep(PAUSE)
    found.recoveries[death].append(time.monotonic() - started)


def engine_pid(live: Live) -> int | None:
    """The engine process, if there is one."""
    for child in psutil.Process(live.process.pid).children():
        try:
            if "engine.process.worker" in child.cmdline():
                return child.pid
        except psutil.Error:  # the process has just ended
            continue
    return None


async def _client(found: Storm, client: httpx.AsyncClient, kind: Any) -> None:
    """One request after the other; each has to end exactly once."""
    while not found.over:
        prompt = found.rng.choice(PROMPTS)
        try:
            end, fault = await kind(client, prompt, found.expected[prompt])
        except httpx.HTTPError as error:
            end, fault = "lost", repr(error)
        found.ends[end] += 1
        if fault:
            found.faults.append(f"{kind.__name__}: {end}: {fault}")
        if end != "answered":
            await asyncio.sleep(RETRY)


async def _whole(client: httpx.AsyncClient, prompt: str, expected: str) -> tuple[str, str]:
    answer = await client.post("/v1/completions", json=_body(prompt))
    if answer.status_code != 200:
        return _refusal(answer.status_code, answer.json())
    [choice] = answer.json()["choices"]
    return "answered", "" if choice["text"] == expected else f"another text: {choice['text']!r}"


async def _stream(client: httpx.AsyncClient, prompt: str, expected: str) -> tuple[str, str]:
    async with client.stream("POST", "/v1/completions", json=_body(prompt, stream=True)) as answer:
        if answer.status_code != 200:
            return _refusal(answer.status_code, json.loads(await answer.aread()))
        lines = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line.startswith("data: ")]
    done = lines.count("[DONE]")
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    errors = [event for event in events if "error" in event]
    choices = [event["choices"][0] for event in events if event.get("choices")]
    finishes = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    text = "".join(choice["text"] for choice in choices)
    if len(errors) + len(finishes) != 1 or done > 1 or (finishes and not done):
        return "lost", f"{len(errors)} errors, {len(finishes)} finish reasons, {done} times [DONE]"
    if not expected.startswith(text) or (finishes and text != expected):
        return "failed" if errors else "answered", f"another text: {text!r}"
    return "failed" if errors else "answered", ""


async def _leave(client: httpx.AsyncClient, prompt: str, expected: str) -> tuple[str, str]:
    """Hang up after the first events."""
    async with client.stream("POST", "/v1/completions", json=_body(prompt, stream=True)) as answer:
        if answer.status_code != 200:
            return _refusal(answer.status_code, json.loads(await answer.aread()))
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                return ("failed" if '"error"' in line else "left"), ""
    return "lost", "a stream without an event"


def _refusal(status: int, body: dict[str, Any]) -> tuple[str, str]:
    known = {503: "refused", 500: "failed"}
    return known.get(status, "lost"), "" if status in known and "message" in body["error"] else f"{status}: {body}"


def _body(prompt: str, **options: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 48, "temperature": 0, "num_experts": 2, **options}


async def _probe(found: Storm) -> None:
    """Whether HTTP answers, and how fast."""
    async with httpx.AsyncClient(base_url=found.live.url, timeout=10) as client:
        while not found.over:
            started = time.monotonic()
            try:
                answer = await client.get("/live")
                if answer.status_code != 200:
                    found.faults.append(f"/live answered {answer.status_code}")
            except httpx.HTTPError as error:
                found.faults.append(f"/live: {error!r}")
            found.probes.append(time.monotonic() - started)
            await asyncio.sleep(PAUSE)


async def _nothing_left(found: Storm, client: httpx.AsyncClient) -> None:
    """Nothing runs, waits or holds memory; the server has counted as many ends as were sent, and every restart."""
    live = found.live
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        if not await asyncio.to_thread(live.settles, gauge, 0.0):
            found.faults.append(f"{gauge} is {live.metric(gauge)} at the end")
    names = ("request_success_total", "requests_failed_total", "requests_aborted_total", "requests_rejected_total")
    counted = {name: live.metric(name) for name in names}
    if sum(counted.values()) != found.sent:
        found.faults.append(f"{found.sent} requests were sent, the server counted {counted}")
    deaths = sum(map(len, found.recoveries.values()))
    if (restarts := live.metric("engine_restarts_total")) != deaths:
        found.faults.append(f"the engine died {deaths} times and was started again {restarts:g} times")


def figures(found: Storm, seconds: float) -> dict[str, Any]:
    """The outcome as plain numbers, times in seconds."""
    recovery = {
        death: {"times": len(times), "median": round(statistics.median(times), 2), "worst": round(max(times), 2)}
        for death, times in found.recoveries.items()
        if times
    }
    return {
        "sent": found.sent,
        **{end: found.ends[end] for end in (*ENDS, "lost")},
        "recovery": recovery,
        "live": {
            "probes": len(found.probes),
            "median": round(statistics.median(found.probes), 4),
            "worst": round(max(found.probes), 3),
        },
        "seconds": round(seconds),
        "faults": len(found.faults),
    }


def table(result: dict[str, Any]) -> str:
    rows = ["| requests | " + " | ".join(("sent", *ENDS, "lost")) + " |", "|---|" + "---|" * 6]
    rows.append("| | " + " | ".join(str(result[name]) for name in ("sent", *ENDS, "lost")) + " |")
    rows += ["", "| seconds | times | median | worst |", "|---|---|---|---|"]
    for name, row in result["recovery"].items():
        rows.append(f"| from a {name} to ready again | {row['times']} | {row['median']} | {row['worst']} |")
    live = result["live"]
    rows.append(f"| /live answers in | {live['probes']} | {live['median']} | {live['worst']} |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--hangs", type=int, default=1)
    parser.add_argument("--hang-seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    hang = str(options.hang_seconds)
    with serving("--log-level", "error", "--hang-seconds", hang, watched=False) as live:
        started = time.monotonic()
        found = asyncio.run(storm(live, options.kills, options.hangs, options.seed))
    result = figures(found, time.monotonic() - started)
    print("\n".join([table(result), *found.faults[:20], json.dumps(result)]))
    return int(bool(found.faults) or found.ends["lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())
