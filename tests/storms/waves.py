"""A storm that measures memory: waves of mixed load, with clients that leave, and both processes' memory after each.

`python -m tests.storms.waves --waves 30 --plot docs/memory.png` prints a table and one line of JSON, and fails if the
last third of the waves ended higher than the third before it, or a request was lost.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.e2e.live import Live, serving
from tests.storms.base import ANSWER_SECONDS, ANSWERED, CHAT, COMPLETIONS, LEFT, RESPONSES, Storm
from tests.storms.bodies import scores, texts
from tests.storms.engine_deaths import engine_pid
from tests.storms.many_clients import leave_whole, leavers

REQUESTS, AT_ONCE = 240, 40
SLACK = 8 << 20  # bytes by which the last third may end above the third before it
MIB = 1 << 20


async def drawn(storm: Storm, number: int) -> str:
    body = {"prompt": f"Once upon a time {number}", "max_tokens": 40, "num_experts": 1 + number % 8, "logprobs": 5}
    return await storm.post(COMPLETIONS, body | {"stream": number % 2 == 0, "n": 1 + number % 3})


async def chatted(storm: Storm, number: int) -> str:
    said = [{"role": "user", "content": "word " * (number % 60 + 1)}]
    return await storm.post(CHAT, {"messages": said, "max_tokens": 24, "temperature": 0, "num_experts": 1 + number % 4})


async def constrained(storm: Storm, number: int) -> str:
    schema = {"type": "object", "properties": {f"age{number % 50}": {"type": "integer"}}}
    return await storm.post(COMPLETIONS, {"prompt": "hi", "max_tokens": 24, "guided_json": schema})


async def responded(storm: Storm, number: int) -> str:
    return await storm.post(
        RESPONSES, {"input": "Tell me a story.", "max_output_tokens": 24, "stream": bool(number % 2)}
    )


async def refused(storm: Storm, number: int) -> str:
    return await storm.post(COMPLETIONS, {"prompt": "x" * 100_000, "max_tokens": 8})


MIX = (drawn, chatted, constrained, responded, leavers, leave_whole, texts, refused, drawn, chatted, leavers, scores)


async def run(live: Live, waves: int) -> tuple[Storm, list[tuple[float, float]]]:
    """After each wave, the mebibytes of the HTTP process and of the engine with its helpers."""
    levels = []
    async with httpx.AsyncClient(base_url=live.url, timeout=ANSWER_SECONDS) as client:
        storm = Storm(live, client)
        for wave in range(waves):
            storm.wave = f"wave {wave}"
            await _wave(storm, wave)
            await asyncio.to_thread(live.settles, "num_requests_running", 0)
            levels.append(_levels(live))
    return storm, levels


async def _wave(storm: Storm, wave: int) -> None:
    places = asyncio.Semaphore(AT_ONCE)
    ends = storm.ends.setdefault("all", Counter())

    async def one(number: int) -> None:
        async with places:
            ends[await MIX[number % len(MIX)](storm, wave * REQUESTS + number)] += 1

    await asyncio.gather(*(one(number) for number in range(REQUESTS)))


def _levels(live: Live) -> tuple[float, float]:
    server = psutil.Process(live.process.pid)
    engine = psutil.Process(engine_pid(live) or live.process.pid)
    whole = [engine, *engine.children(recursive=True)]
    return server.memory_info().rss / MIB, sum(process.memory_info().rss for process in whole) / MIB


def faults(storm: Storm, levels: list[tuple[float, float]]) -> list[str]:
    """What was lost, and what grew."""
    found = list(storm.faults)
    third = len(levels) // 3
    for name, column in (("HTTP process", 0), ("engine", 1)):
        before, last = ([level[column] for level in part] for part in (levels[-2 * third : -third], levels[-third:]))
        grown = statistics.median(last) - statistics.median(before) if third else 0.0
        if grown * MIB > SLACK:
            found.append(f"the {name} grew by {grown:.1f} MiB from the second third of the waves to the last")
    return found


def plot(levels: list[tuple[float, float]], path: Path) -> None:
    """Memory after each wave."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3))
    for name, column in (("HTTP process", 0), ("engine", 1)):
        axes.plot(range(1, len(levels) + 1), [level[column] for level in levels], marker=".", label=name)
    axes.set(xlabel=f"wave of {REQUESTS} requests", ylabel="resident MiB", ylim=(0, None))
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def figures(storm: Storm, levels: list[tuple[float, float]], seconds: float) -> dict[str, Any]:
    ends = storm.ends["all"]
    return {
        "sent": ends.total(),
        "answered": ends[ANSWERED],
        "left": ends[LEFT],
        **{end: count for end, count in ends.items() if end not in (ANSWERED, LEFT)},
        "levels": [[round(each, 1) for each in level] for level in levels],
        "seconds": round(seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waves", type=int, default=12)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with serving("--log-level", "error", watched=False) as live:
        started = time.monotonic()
        storm, levels = asyncio.run(run(live, options.waves))
        result = figures(storm, levels, time.monotonic() - started)
    if options.plot:
        plot(levels, options.plot)
    print("| wave | HTTP process, MiB | engine, MiB |\n|---|---|---|")
    for number, (server, engine) in enumerate(levels, 1):
        print(f"| {number} | {server:.1f} | {engine:.1f} |")
    wrong = faults(storm, levels)
    print("\n".join([*wrong[:20], json.dumps(result)]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
