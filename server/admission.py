"""The bounded queue in front of the engine: a slot is taken before any work, and turns are given in order of arrival.

Counts sequences (a request of n counts n) and prompt tokens. It knows neither requests nor the engine.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from model.errors import EngineBusy, InvalidRequest
from server.errors import QueueTimeout


class Admission:
    """`running` sequences may be with the engine (and a few more, so that its batch refills without waiting for us)."""

    def __init__(self, running: int, queue: int, max_tokens: int) -> None:
        self.capacity = running + queue
        self.max_tokens = max_tokens
        self.held = 0
        self.waiting = 0
        self.tokens = 0
        self._turns = asyncio.Semaphore(min(self.capacity, running + 1 + running // 8))

    def reserve(self, sequences: int) -> "Reservation":
        """Take slots now or refuse now.

        Raises:
            InvalidRequest: more than this server could ever hold.
            EngineBusy: no room at this moment.
        """
        if sequences > self.capacity:
            raise InvalidRequest(
                f"n x prompts = {sequences} sequences; this server holds at most {self.capacity} at once", "n"
            )
        if self.held + sequences > self.capacity:
            raise EngineBusy(f"the queue is full: {self.held} of {self.capacity} sequences are held")
        self.held += sequences
        return Reservation(self, sequences)

    @asynccontextmanager
    async def turn(self, timeout: float) -> AsyncIterator[None]:
        """Wait in order for a place in the engine's batch, and hold it."""
        self.waiting += 1
        try:
            async with asyncio.timeout(timeout):
                await self._turns.acquire()
        except TimeoutError:
            raise QueueTimeout(f"waited {timeout:g} s for a place in the batch; try again later", 5) from None
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._turns.release()


class Reservation:
    """Slots held by one request. Releasing twice is harmless."""

    def __init__(self, admission: Admission, sequences: int) -> None:
        self._admission, self._sequences, self._tokens = admission, sequences, 0

    def add_tokens(self, count: int) -> None:
        held, limit = self._admission.tokens, self._admission.max_tokens
        if count > limit:
            raise InvalidRequest(f"prompt: {count} tokens in all; this server holds at most {limit} at once", "prompt")
        if held + count > limit:
            raise EngineBusy(f"the queue is full: {held} of {limit} prompt tokens are held, {count} more were asked")
        self._admission.tokens += count
        self._tokens += count

    def release(self) -> None:
        self._admission.held -= self._sequences
        self._admission.tokens -= self._tokens
        self._sequences = self._tokens = 0
