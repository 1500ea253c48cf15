"""Sequences that wait and sequences that run, each in order of arrival, and what must hold of that order.

It plans nothing, and knows blocks only by who holds them.
"""

from collections import OrderedDict
from collections.abc import Set
from itertools import chain, islice

from engine.sequence import Sequence

LOOK = 64  # waiting sequences among which the oldest is sought: set back, one is younger than its place


class Queues:
    """At most one sequence is partly read: `partly`. Those that overtook it come after it in the order, and so give way
    before it does."""

    def __init__(self) -> None:
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.running: OrderedDict[str, Sequence] = OrderedDict()
        self.partly: Sequence | None = None  # runs, and more than one of its tokens is still to be computed
        self._count = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, the youngest of all."""
        self._count += 1
        sequence.number = self._count
        self.waiting[sequence.id] = sequence

    def start(self, sequence: Sequence) -> None:
        """Move a sequence that waits to those that run."""
        _insert(self.running, self.waiting.pop(sequence.id))

    def set_back(self, sequence: Sequence, now: float) -> None:
        """Move a sequence that runs to those that wait."""
        sequence.waits_since = now
        _insert(self.waiting, self.running.pop(sequence.id))
        self._forget(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Remove a sequence that ends."""
        self.running.pop(sequence.id, None)
        self.waiting.pop(sequence.id, None)
        self._forget(sequence)

    def upcoming(self, count: int) -> tuple[Sequence, ...]:
        """The first `count` that wait for nothing but their turn."""
        return tuple(islice((sequence for sequence in self.waiting.values() if sequence.ready), count))

    def note_read(self, sequence: Sequence) -> None:
        """Take in that a chunk of a sequence was computed. A prompt with one token left is like a decode."""
        if sequence.pending > 1:
            self.partly = sequence
        else:
            self._forget(sequence)

    @property
    def has_plain(self) -> bool:
        """Whether a sequence without a grammar runs, or waits among the first."""
        some = chain(self.running.values(), islice(self.waiting.values(), LOOK))
        return any(sequence.matcher is None for sequence in some)

    @property
    def youngest(self) -> Sequence:
        """The sequence that gives way when memory runs out: of those that run, the last to arrive."""
        return next(reversed(self.running.values()))

    @property
    def waits_since(self) -> float | None:
        """When the sequence that has waited longest for its next token began to; None where none waits."""
        partly = () if self.partly is None else (self.partly,)
        unread = chain(partly, islice(self.waiting.values(), LOOK))
        return min((sequence.waits_since for sequence in unread), default=None)

    def check(self, holders: Set[str], chunked: bool) -> None:
        """Verify that `holders` of blocks run, the order, and that `partly` is what it says.

        Raises:
            RuntimeError: one does not hold.
        """
        if not holders <= self.running.keys():
            raise RuntimeError("scheduler: blocks are held by a sequence that does not run")
        for queue in (self.running, self.waiting):
            numbers = [sequence.number for sequence in queue.values()]
            if numbers != sorted(numbers):
                raise RuntimeError("scheduler: the order of arrival is broken")
        partly = [sequence for sequence in self.running.values() if sequence.pending > 1]
        if chunked and partly != ([] if self.partly is None else [self.partly]):
            raise RuntimeError("scheduler: more than one prompt is partly read, or another than the one that is known")

    def _forget(self, sequence: Sequence) -> None:
        if self.partly is sequence:
            self.partly = None


def _insert(queue: OrderedDict[str, Sequence], sequence: Sequence) -> None:
    """Put a sequence in its place by arrival: mostly the end or the beginning, so that few others must move."""
    older = [other.id for other in queue.values() if other.number < sequence.number]
    queue[sequence.id] = sequence
    if len(older) + 1 < len(queue):
        for id in (sequence.id, *reversed(older)):
            queue.move_to_end(id, last=False)
