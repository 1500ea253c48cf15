"""Long work in slices: the same result as at once, with turns for others in between."""

import asyncio
import time
from typing import Any

import orjson
import pytest

from server.event_loop.slices import ENTRIES, SLICE, Steps, at_once, in_slices, long_list


def slow(steps: int) -> Steps[int]:
    """Steps that take a slice each."""
    for _ in range(steps):
        time.sleep(SLICE)
        yield
    return steps


def test_others_get_their_turns() -> None:
    async def body() -> int:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(other())
        assert await in_slices(slow(10)) == 10
        beside.cancel()
        return turns

    assert asyncio.run(body()) >= 9
    assert at_once(slow(2)) == 2


@pytest.mark.parametrize("length", [0, 1, ENTRIES, ENTRIES + 1, 3 * ENTRIES])
def test_a_long_list_is_written_as_any_list(length: int) -> None:
    entries: list[Any] = [{"n": n, "text": "ä"} for n in range(length)]
    assert orjson.dumps({"list": at_once(long_list(entries))}) == orjson.dumps({"list": entries})
