"""Who is next to hand a sequence to the engine: keys in rotation, within a key its calls, within a call its sequences.

It knows how many places there are and who holds them, no requests and no tokens.
"""

import asyncio
import time
from collections import OrderedDict, deque

from server.errors import QueueTimeout

Place = asyncio.Future[None]


class Line:
    """The sequences of one call that wait for a place, in order, and how many hold one."""

    def __init__(self, owner: str) -> None:
        self.owner, self.held = owner, 0
        self.began = False  # one has had a place
        self.waiting: deque[Place] = deque()


class Turns:
    """`places` in all, of which one call holds at most `most`, so that there is nearly always one for another call.

    While a place is free, no call waits for one that it may have.
    """

    def __init__(self, places: int, most: int) -> None:
        self.free = places
        self._most = most
        self._owners: OrderedDict[str, OrderedDict[Line, None]] = OrderedDict()  # those that wait, the next one first
        self._since: dict[Place, float] = {}  # the oldest first

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place."""
        return len(self._since)

    @property
    def oldest_s(self) -> float:
        """How long the sequence that came first has waited, in seconds; 0 where none waits."""
        since = next(iter(self._since.values()), None)
        return 0.0 if since is None else time.monotonic() - since

    async def take(self, line: Line, timeout: float) -> None:
        """Wait for a place. `give_back` must follow.

        Raises:
            QueueTimeout: the call has had no place at all for so many seconds.
        """
        if self.free and line.held < self._most:
            self._give(line)
            return
        place = self._join(line)
        try:
            if not line.began:
                await asyncio.wait((place,), timeout=timeout)
                if not place.done() and not line.began:
                    raise QueueTimeout(f"waited {timeout:g} s for a place in the batch; try again later", 5)
            await place
        except BaseException:
            if place.done() and not place.cancelled():
                self.give_back(line)
            else:
                self._leave(line, place)
            raise

    def give_back(self, line: Line) -> None:
        """Give a place to the next in turn."""
        line.held -= 1
        self.free += 1
        self._grant()

    def _grant(self) -> None:
        while self.free and (line := self._next()) is not None:
            place = line.waiting[0]
            self._leave(line, place)
            if not place.cancelled():
                self._give(line)
                place.set_result(None)

    def _next(self) -> Line | None:
        """The next call that may have a place; it and its key go to the end of the rotation."""
        for owner, lines in self._owners.items():
            for line in lines:
                if line.held < self._most:
                    lines.move_to_end(line)
                    self._owners.move_to_end(owner)
                    return line
        return None

    def _give(self, line: Line) -> None:
        self.free -= 1
        line.held += 1
        line.began = True

    def _join(self, line: Line) -> Place:
        place: Place = asyncio.get_running_loop().create_future()
        self._owners.setdefault(line.owner, OrderedDict())[line] = None
        line.waiting.append(place)
        self._since[place] = time.monotonic()
        return place

    def _leave(self, line: Line, place: Place) -> None:
        """Take a place out of the queue; a second time does nothing."""
        if self._since.pop(place, None) is None:
            return
        line.waiting.remove(place)
        if line.waiting:
            return
        lines = self._owners[line.owner]
        del lines[line]
        if not lines:
            del self._owners[line.owner]
