"""Slots go round by key and call, a large call leaves some to others, and none is lost or given twice."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import QueueTimeout
from server.generation.fair_queue import CallQueue, FairQueue
from tests.server.harness import COMPLETIONS, eventually, on_loopback, value
from tests.server.test_life import gated, idle, in_background


class Calls:
    """Queues of named calls, and the order in which their sequences got slots."""

    def __init__(self, slots: int, max_per_call: int) -> None:
        self.fair_queue = FairQueue(slots, max_per_call)
        self.queues: dict[str, CallQueue] = {}
        self.order: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    def ask(self, call: str, count: int, owner: str = "", timeout: float = 5.0) -> None:
        queue = self.queues.setdefault(call, CallQueue(owner))
        self.tasks += [asyncio.create_task(self._wait(call, queue, timeout)) for _ in range(count)]

    async def _wait(self, call: str, queue: CallQueue, timeout: float) -> None:
        await self.fair_queue.acquire(queue, timeout)
        self.order.append(call)

    async def release(self, call: str, count: int = 1) -> None:
        for _ in range(count):
            self.fair_queue.release(self.queues[call])
            await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))  # type: ignore[arg-type]


def test_calls_take_turns_and_within_a_call_order_is_kept() -> None:
    async def test() -> None:
        calls = Calls(2, max_per_call=2)
        calls.ask("large", 6)
        await settle()
        calls.ask("small", 1)
        calls.ask("other", 2)
        await settle()
        assert calls.order == ["large"] * 2 and calls.fair_queue.waiting == 7
        for _ in range(6):
            await calls.release(calls.order[-1])
        assert calls.order[2:] == ["large", "small", "other", "large", "other", "large"]

    in_loop(test)


def test_keys_take_turns_however_many_calls_each_has() -> None:
    async def test() -> None:
        calls = Calls(1, max_per_call=1)
        calls.ask("first", 1, "a")
        await settle()
        for call in ("a1", "a2", "a3"):
            calls.ask(call, 2, "a")
        calls.ask("b1", 2, "b")
        await settle()
        for _ in range(8):
            await calls.release(calls.order[-1])
        assert calls.order == ["first", "a1", "b1", "a2", "b1", "a3", "a1", "a2", "a3"]

    in_loop(test)


def test_a_call_leaves_places_to_others() -> None:
    async def test() -> None:
        calls = Calls(9, max_per_call=7)
        calls.ask("large", 20)
        await settle()
        assert calls.order == ["large"] * 7
        calls.ask("small", 1)
        await settle()
        assert calls.order[7:] == ["small"]

    in_loop(test)


def test_the_limit_is_that_of_a_calls_first_turn() -> None:
    async def test() -> None:
        calls = Calls(1, max_per_call=1)
        calls.ask("large", 3, timeout=0.02)
        calls.ask("late", 2, timeout=0.02)
        await asyncio.sleep(0.1)
        assert [type(task.exception()) for task in calls.tasks if task.done() and task.exception()] == [
            QueueTimeout
        ] * 2
        assert calls.fair_queue.waiting == 2 and calls.fair_queue.oldest_s > 0.05
        await calls.release("large", 2)
        assert calls.order == ["large"] * 3

    in_loop(test)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_no_place_is_lost_or_given_twice(slots: int, max_per_call: int, seed: int) -> None:
    """A caller may leave while it waits, when it is just granted a place, or with one."""
    rng = random.Random(seed)

    async def sequence(fair_queue: FairQueue, queue: CallQueue, held: list[int]) -> None:
        await fair_queue.acquire(queue, timeout=60)
        held.append(1)
        assert len(held) <= slots and queue.held <= max_per_call
        try:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
        finally:
            held.pop()
            fair_queue.release(queue)

    async def test() -> None:
        fair_queue, held = FairQueue(slots, max_per_call), list[int]()
        queues = [CallQueue(rng.choice("ab")) for _ in range(4)]
        tasks = [asyncio.create_task(sequence(fair_queue, rng.choice(queues), held)) for _ in range(30)]
        for _ in range(15):
            await asyncio.sleep(0)
            rng.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(not task.cancelled() for task in tasks) >= 15
        assert (fair_queue.free, fair_queue.waiting, fair_queue.oldest_s, [queue.held for queue in queues]) == (
            slots,
            0,
            0.0,
            [0] * 4,
        )
        assert not fair_queue._owners

    in_loop(test)


def test_a_small_request_beside_256_sequences_is_with_the_engine_at_once() -> None:
    engine = gated()
    body = {"prompt": ["hi"] * 64, "n": 4, "logprobs": 5}
    with on_loopback(engine, max_running=64) as (url, service):
        with in_background(1, url + COMPLETIONS, body):
            eventually(lambda: service.admission.waiting == 256 - 56)
            assert value(service, "num_requests_waiting") == 200
            with in_background(1, url + COMPLETIONS, {"prompt": "small", "max_tokens": 1}) as small:
                eventually(lambda: len(engine.running) == 57)
                assert bytes(engine.seen[-1].prompt) == b"small"
                assert engine.gate is not None
                engine.gate.set()
            assert [answer.status_code for answer in small] == [200]
        eventually(lambda: idle(engine, service), 20)


@pytest.mark.parametrize("running", [1, 4])
def test_small_batches_are_not_shared_out(running: int) -> None:
    """A call may have all of them, and the one that waits in the engine."""
    engine = gated()
    with on_loopback(engine, max_running=running) as (url, service):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + COMPLETIONS, json={"prompt": ["hi"] * 8}, timeout=0.3)
        assert len(engine.seen) == running + 1
        eventually(lambda: idle(engine, service))
