"""One request of hundreds of sequences on a real server, and how long small requests beside it wait.

`python -m tests.storms.greedy_call` prints a line of JSON with the times to first token of small requests without and
beside the large one, and fails where one of them is refused or waits longer than `--most` seconds.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from typing import Any

import httpx

from tests.e2e.live import Live, serving

LARGE = {"prompt": [f"Once upon a time there were {n}" for n in range(64)], "n": 4, "max_tokens": 200, "logprobs": 5}
SMALL = {"prompt": "One day", "max_tokens": 4, "temperature": 0, "stream": True}
PAUSE = 0.3  # seconds between small requests


async def storm(live: Live, large: dict[str, Any], alone: int = 5) -> dict[str, Any]:
    """What the small requests waited, in seconds, and how the large one ended."""
    async with httpx.AsyncClient(base_url=live.url, timeout=httpx.Timeout(600)) as client:
        quiet = [await _first_token(client) for _ in range(alone)]
        began = time.monotonic()
        call = asyncio.create_task(client.post("/v1/completions", json=large | {"ignore_eos": True}))
        beside: list[float] = []
        await asyncio.sleep(PAUSE)
        while not call.done():
            beside.append(await _first_token(client))
            await asyncio.sleep(PAUSE)
        answer = (await call).json()
        return {
            "sequences": len(answer["choices"]),
            "large_s": round(time.monotonic() - began, 2),
            "alone_worst_s": round(max(quiet), 3),
            "beside": len(beside),
            "beside_median_s": round(statistics.median(beside), 3),
            "beside_worst_s": round(max(beside), 3),
        }


async def _first_token(client: httpx.AsyncClient) -> float:
    began = time.monotonic()
    async with client.stream("POST", "/v1/completions", json=SMALL) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                return time.monotonic() - began
    raise AssertionError("no token came")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=float, default=3.0, help="seconds that a small request may wait")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each of the large one's sequences")
    arguments = parser.parse_args()
    with serving("--log-level", "error") as live:
        figures = asyncio.run(storm(live, LARGE | {"max_tokens": arguments.tokens}))
        print(json.dumps(figures), flush=True)
    return int(figures["beside_worst_s"] > arguments.most)


if __name__ == "__main__":
    sys.exit(main())
