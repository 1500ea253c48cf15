"""Which sequence gets the next slot in the engine's batch: API keys in rotation, within a key its requests in rotation,
within a request its sequences in order.

A "call" here and in the files beside is a generation call: one HTTP request that generates, with all its sequences.
"""

import asyncio
import time
from collections import OrderedDict, deque

from server.errors import QueueTimeout

Slot = asyncio.Future[None]  # done once it has been granted


class CallQueue:
    """The sequences of one generation call that wait for a slot, in order, and how many of them hold one."""

    def __init__(self, owner: str) -> None:
        self.owner, self.held = owner, 0
        self.started = False  # whether one has had a slot
        self.waiting: deque[Slot] = deque()


class FairQueue:
    """`slots` in all, of which one call holds at most `max_per_call`, so that another call nearly always finds one.

    While a slot is free, no call waits for one that it may have.
    """

    def __init__(self, slots: int, max_per_call: int) -> None:
        self.free = self._slots = slots
        self._max_per_call = max_per_call
        self._owners: OrderedDict[str, OrderedDict[CallQueue, None]] = OrderedDict()  # those that wait, next one first
        self._since: dict[Slot, float] = {}  # the oldest first

    @property
    def held(self) -> int:
        """Slots that are held."""
        return self._slots - self.free

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._since)

    @property
    def oldest_s(self) -> float:
        """How long the sequence that waits longest has waited, in seconds; 0 where none waits."""
        since = next(iter(self._since.values()), None)
        return 0.0 if since is None else time.monotonic() - since

    async def acquire(self, call: CallQueue, timeout: float) -> None:
        """Wait for a slot; `release` must follow. Only a call without any slot so far is bound to `timeout` seconds.

        Raises:
            QueueTimeout: the time is over.
        """
        if self.free and call.held < self._max_per_call:
            self._take(call)
            return
        slot = self._join(call)
        try:
            if not call.started:
                await asyncio.wait((slot,), timeout=timeout)
                if not slot.done() and not call.started:
                    raise QueueTimeout(f"waited {timeout:g} s for a place in the batch; try again later", 5)
            await slot
        except BaseException:
            if slot.done() and not slot.cancelled():
                self.release(call)
            else:
                self._leave(call, slot)
            raise

    def release(self, call: CallQueue) -> None:
        """Give a slot of `call` to the next sequence."""
        call.held -= 1
        self.free += 1
        self._grant()

    def _grant(self) -> None:
        while self.free and (call := self._next()) is not None:
            slot = call.waiting[0]
            self._leave(call, slot)
            if not slot.cancelled():
                self._take(call)
                slot.set_result(None)

    def _next(self) -> CallQueue | None:
        """The next call that may have a slot; it and its key go to the end of the rotation."""
        for owner, calls in self._owners.items():
            for call in calls:
                if call.held < self._max_per_call:
                    calls.move_to_end(call)
                    self._owners.move_to_end(owner)
                    return call
        return None

    def _take(self, call: CallQueue) -> None:
        self.free -= 1
        call.held += 1
        call.started = True

    def _join(self, call: CallQueue) -> Slot:
        slot: Slot = asyncio.get_running_loop().create_future()
        self._owners.setdefault(call.owner, OrderedDict())[call] = None
        call.waiting.append(slot)
        self._since[slot] = time.monotonic()
        return slot

    def _leave(self, call: CallQueue, slot: Slot) -> None:
        """Take a waiting sequence out of the queue; a second time does nothing."""
        if self._since.pop(slot, None) is None:
            return
        call.waiting.remove(slot)
        if call.waiting:
            return
        calls = self._owners[call.owner]
        del calls[call]
        if not calls:
            del self._owners[call.owner]
