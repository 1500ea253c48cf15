"""A storm of many clients: thousands of requests at once, clients that leave or read slowly, calls that fill the cache.

`python -m tests.storms.many_clients [WAVE …]`
"""

import asyncio
import json
import sys
from urllib.parse import urlsplit

import httpx

from tests.storms.base import ANSWERED, CHAT, COMPLETIONS, FAILED, LEFT, LOST, REFUSED, Storm, Wave, main

ONCE = {"prompt": "Once upon a time", "temperature": 0}
# Room for 8 whole contexts, so that requests preempt each other.
FLAGS = ("--kv-cache-bytes", str(24 << 20), "--max-connections", "4096")
READ_SECONDS = 4.0  # of a reader who takes a byte at a time


async def at_once(storm: Storm, number: int) -> str:
    return await storm.post(COMPLETIONS, ONCE | {"max_tokens": 2, "num_experts": 1 + number % 8})


async def leavers(storm: Storm, number: int) -> str:
    """Hang up after the first bytes, at another place of the stream each time."""
    body = ONCE | {"max_tokens": 200, "stream": True, "num_experts": 1 + number % 8}
    try:
        async with storm.client.stream("POST", COMPLETIONS, json=body) as answer:
            if answer.status_code != 200:
                return storm.end_of(answer.status_code, await answer.aread())
            left = number % 7
            async for _ in answer.aiter_bytes():
                left -= 1
                if left < 0:
                    return LEFT
            return ANSWERED
    except httpx.HTTPError as error:
        storm.faults.append(f"{storm.wave}: {error!r}")
        return LOST


async def leave_whole(storm: Storm, number: int) -> str:
    """Hang up on an answer that is not streamed."""
    try:
        await storm.client.post(COMPLETIONS, json=ONCE | {"max_tokens": 200, "n": 4}, timeout=0.05 + number % 10 * 0.03)
    except httpx.TimeoutException:
        return LEFT
    return ANSWERED


async def slow_readers(storm: Storm, number: int) -> str:
    """Take one byte now and then, then hang up."""
    address = urlsplit(storm.live.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1)
    body = json.dumps(ONCE | {"max_tokens": 240, "stream": True, "logprobs": 20}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
    for _ in range(int(READ_SECONDS / 0.2)):
        await reader.read(1)
        await asyncio.sleep(0.2)
    writer.close()
    return LEFT


async def everything(storm: Storm, number: int) -> str:
    """One call that would take every slot for a long time."""
    body = {"prompt": ["Once upon a time", "A dog"] * 16, "n": 8, "max_tokens": 100, "logprobs": 20, "temperature": 1}
    return await storm.post(COMPLETIONS, body)


async def long_prompts(storm: Storm, number: int) -> str:
    return await storm.post(
        COMPLETIONS, {"prompt": [1 + (number + i) % 200 for i in range(480)], "max_tokens": 16, "num_experts": 8}
    )


async def squeezed(storm: Storm, number: int) -> str:
    """Many long answers that do not fit the cache together; each must equal the answer of a lone request."""
    body = ONCE | {"max_tokens": 300, "ignore_eos": True, "num_experts": 4}
    answer = await storm.client.post(COMPLETIONS, json=body)
    if answer.status_code != 200:
        return storm.end_of(answer.status_code, answer.content)
    text = answer.json()["choices"][0]["text"]
    first = _SQUEEZED.setdefault("text", text)
    if text != first:
        storm.faults.append(f"squeezed: another text: {text[:80]!r}")
    return ANSWERED


_SQUEEZED: dict[str, str] = {}


async def chats(storm: Storm, number: int) -> str:
    said = [{"role": "user", "content": "Tell me a story."}]
    return await storm.post(CHAT, {"messages": said, "max_tokens": 24, "stream": bool(number % 2)})


WAVES = (
    Wave("10,000 at once", at_once, 10_000, 1_000, (ANSWERED, REFUSED)),
    Wave("1,000 disconnects", leavers, 1_000, 60, (ANSWERED, REFUSED, LEFT)),
    Wave("disconnects, whole", leave_whole, 200, 20, (ANSWERED, REFUSED, LEFT), counted=False),
    Wave("slow readers", slow_readers, 60, 60, (LEFT,)),
    Wave("long prompts", long_prompts, 100, 50, (ANSWERED, REFUSED)),
    Wave("more than the cache", squeezed, 48, 48, (ANSWERED,)),
    Wave("one call of 256", everything, 2, 1, (ANSWERED, FAILED), counted=False),
    Wave("chats", chats, 100, 20, (ANSWERED, REFUSED)),
)

if __name__ == "__main__":
    sys.exit(main(__doc__ or "", WAVES, *FLAGS))
