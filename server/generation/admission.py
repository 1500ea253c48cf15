"""The bounded queue in front of the engine: a request reserves room in it before any work is done for it.

It counts sequences (a request with n = 4 counts 4) and prompt tokens, by API key (`owner`) as well. Which sequence runs
next is decided in `server/generation/fair_queue.py`.
"""

import math
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from model.errors import EngineBusy, InvalidRequest
from server.errors import KeyShareTaken
from server.generation.fair_queue import CallQueue, FairQueue


class Admission:
    """Up to `running` sequences are in the engine (and a few more, so that its batch is refilled without a round trip).

    Where eight or more may run, one call leaves an eighth of the batch to others.

    `shares`: by owner, the share of sequences and of prompt tokens that may be held at once, but at least one. An owner
    without an entry may hold all.
    """

    def __init__(self, running: int, queue: int, max_tokens: int, shares: Mapping[str, float]) -> None:
        self.capacity = running + queue
        self._shares = shares
        self.held_by: Counter[str] = Counter()
        self.tokens_by: Counter[str] = Counter()
        self.max_tokens = max_tokens
        self.held = 0
        self.tokens = 0
        slots = min(self.capacity, running + 1 + running // 8)
        max_per_call = running - running // 8 if running >= 8 else slots
        self.fair_queue = FairQueue(slots, max_per_call)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot in the engine's batch."""
        return self.fair_queue.waiting

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return self.fair_queue.held

    def reserve(self, sequences: int, owner: str) -> "Reservation":
        """Reserve room for sequences, or refuse at once; this does not wait.

        Raises:
            InvalidRequest: more than this server, or this owner, could ever hold.
            EngineBusy: no room at this moment.
            KeyShareTaken: the owner's share is used up at this moment.
        """
        if sequences > self.capacity:
            raise InvalidRequest(
                f"n x prompts = {sequences} sequences; this server holds at most {self.capacity} at once", "n"
            )
        self.check_share(owner, sequences, self.held_by[owner], self.capacity, "sequences", "n")
        if self.held + sequences > self.capacity:
            raise EngineBusy(f"the queue is full: {self.held} of {self.capacity} sequences are held")
        self.held += sequences
        self.held_by[owner] += sequences
        return Reservation(self, sequences, owner)

    def check_share(self, owner: str, more: int, held: int, whole: int, unit: str, field: str) -> None:
        """Check that `more` keeps an owner within its share of the `whole`.

        Raises:
            InvalidRequest: more than its share, even if all of it were free.
            KeyShareTaken: no room in its share at this moment.
        """
        if owner not in self._shares:
            return
        most = max(1, math.floor(self._shares[owner] * whole))
        if more > most:
            raise InvalidRequest(f"{field}: {more} {unit} in all; this key may hold at most {most} at once", field)
        if held + more > most:
            raise KeyShareTaken(
                f"this key holds {held} of at most {most} {unit} at once, {more} more were asked; try again later",
                "places",
            )


class Reservation:
    """The room that one generation call holds. Releasing twice is harmless."""

    def __init__(self, admission: Admission, sequences: int, owner: str) -> None:
        self._admission, self._sequences, self._owner, self._tokens = admission, sequences, owner, 0
        self._queue = CallQueue(owner)

    @asynccontextmanager
    async def slot(self, timeout: float) -> AsyncIterator[None]:
        """Wait for a slot in the engine's batch, and hold it. `timeout`: in seconds, until the call's first slot.

        Raises:
            QueueTimeout: the time is over.
        """
        fair_queue = self._admission.fair_queue
        await fair_queue.acquire(self._queue, timeout)
        try:
            yield
        finally:
            fair_queue.release(self._queue)

    def add_tokens(self, count: int) -> None:
        """Reserve room for prompt tokens. Raises InvalidRequest, EngineBusy or KeyShareTaken."""
        held, limit = self._admission.tokens, self._admission.max_tokens
        if count > limit:
            raise InvalidRequest(f"prompt: {count} tokens in all; this server holds at most {limit} at once", "prompt")
        admission, owner = self._admission, self._owner
        admission.check_share(owner, count, admission.tokens_by[owner], limit, "prompt tokens", "prompt")
        if held + count > limit:
            raise EngineBusy(f"the queue is full: {held} of {limit} prompt tokens are held, {count} more were asked")
        admission.tokens += count
        admission.tokens_by[owner] += count
        self._tokens += count

    def release(self) -> None:
        self._admission.held -= self._sequences
        self._admission.held_by[self._owner] -= self._sequences
        self._admission.tokens -= self._tokens
        self._admission.tokens_by[self._owner] -= self._tokens
        self._sequences = self._tokens = 0
