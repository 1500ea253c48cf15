"""Grammars whose masks are dear, that exhaust their automaton, or that the compiler does not finish, beside a neighbour
who asks for text without one.

`python -m tests.storms.dear_grammars` prints one line of JSON, and fails unless each request was answered or refused by
itself and the neighbour went on.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any

import httpx

from tests.e2e.live import serving

DEAR = "start: s\ns: s s | s s s | /[a-z ]/ | /[a-z]+/ | /[a-e ]+/"
SLOW = [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(1, 40)]
ANSWER = {"prompt": "Once", "max_tokens": 150, "min_tokens": 149, "temperature": 1.0}
WAVES: dict[str, list[dict[str, Any]]] = {
    "dear": [ANSWER | {"guided_grammar": DEAR, "n": 8, "stream": stream} for stream in (False, True)],
    "exhausting": [ANSWER | {"guided_regex": f"[a-z ]*[aeiou][a-z ]{{{40 + i}}}"} for i in range(8)],
    "slow": [ANSWER | {"guided_json": {"allOf": SLOW, "title": str(i)}} for i in range(10)],
}
PATIENCE, WORST = 120.0, 5.0  # seconds for an answer, and for one of the neighbour's


async def main() -> int:
    with serving("--log-level", "error", "--max-running", "32") as live:
        async with httpx.AsyncClient(base_url=live.url, timeout=PATIENCE) as client:
            waits: list[float] = []
            neighbour = asyncio.create_task(ask(client, waits))
            ends = {name: await wave(client, bodies) for name, bodies in WAVES.items()}
            neighbour.cancel()
        left = [name for name in ("num_requests_running", "kv_cache_usage_perc") if not live.settles(name, 0.0)]
    waits.sort()
    result = {"ends": ends, "neighbour": len(waits), "median": waits[len(waits) // 2], "worst": waits[-1], "left": left}
    print(json.dumps(result))
    codes = {code for counts in ends.values() for code in counts}
    return int(bool(left) or waits[-1] > WORST or not codes <= {"ok", "invalid_grammar", "grammar_too_complex"})


async def ask(client: httpx.AsyncClient, waits: list[float]) -> None:
    """A neighbour's requests, one after the other."""
    while True:
        started = time.monotonic()
        response = await client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 8})
        assert response.status_code == 200, response.text
        waits.append(time.monotonic() - started)


async def wave(client: httpx.AsyncClient, bodies: list[dict[str, Any]]) -> Counter[str]:
    """How requests that are sent together end."""
    return Counter(await asyncio.gather(*(end_of(client, body) for body in bodies)))


async def end_of(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    response = await client.post("/v1/completions", json=body)
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    errors = [json.loads(line)["error"]["code"] for line in lines or [response.text] if '"error"' in line]
    return errors[0] if errors else "ok"


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
