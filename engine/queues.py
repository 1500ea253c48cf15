"""Sequences that wait and sequences that run, each in order of arrival, and what must hold of that order.

It plans nothing, and knows blocks only by who holds them.
"""

from collections import OrderedDict
from collections.abc import Set
from itertools import chain, islice

from engine.sequence import Sequence

WINDOW = 64  # waiting sequences among which the oldest is sought: set back, one is younger than its place


class Queues:
    """At most one sequence is partly read: `partly`. Those that overtook it come after it in the order, and so give way
    before it does."""

    def __init__(self) -> None:
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.running: OrderedDict[str, Sequence] = OrderedDict()
        self.partial_prefill: Sequence | None = None  # runs, and more than one of its tokens is still to be computed
        self._count = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, the youngest of all."""
        self._count += 1
        sequence.arrival_number = self._count
        self.waiting[sequence.id] = sequence

    def start(self, sequence: Sequence) -> None:
        """Move a sequence that waits to those that run."""
        _insert(self.running, self.waiting.pop(sequence.id))

    def requeue(self, sequence: Sequence, now: float) -> None:
        """Move a sequence that runs to those that wait."""
        sequence.waiting_since = now
        _insert(self.waiting, self.running.pop(sequence.id))
        self._forget(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that ends."""
        self.running.pop(sequence.id, None)
        self.waiting.pop(sequence.id, None)
        self._forget(sequence)

    def next_ready(self, count: int) -> tuple[Sequence, ...]:
        """The first `count` that wait for nothing but their turn."""
        return tuple(islice((sequence for sequence in self.waiting.values() if sequence.ready), count))

    def record_prefill(self, sequence: Sequence) -> None:
        """Take in that a chunk of a sequence was computed. A prompt with one token left is like a decode."""
        if sequence.pending > 1:
            self.partial_prefill = sequence
        else:
            self._forget(sequence)

    @property
    def has_plain(self) -> bool:
        """Whether a sequence without a grammar runs, or waits among the first."""
        some = chain(self.running.values(), islice(self.waiting.values(), WINDOW))
        return any(sequence.matcher is None for sequence in some)

    @property
    def youngest(self) -> Sequence:
        """The sequence that gives way when memory runs out: of those that run, the last to arrive."""
        return next(reversed(self.running.values()))

    @property
    def waiting_since(self) -> float | None:
        """When the sequence that has waited longest for its next token began to; None where none waits."""
        partly = () if self.partial_prefill is None else (self.partial_prefill,)
        unread = chain(partly, islice(self.waiting.values(), WINDOW))
        return min((sequence.waiting_since for sequence in unread), default=None)

    def check(self, holders: Set[str], chunked: bool) -> None:
        """Verify that `holders` of blocks run, the order, and that `partly` is what it says.

        Raises:
            RuntimeError: one does not hold.
        """
        if not holders <= self.running.keys():
            raise RuntimeError("scheduler: blocks are held by a sequence that does not run")
        for queue in (self.running, self.waiting):
            numbers = [sequence.arrival_number for sequence in queue.values()]
            if numbers != sorted(numbers):
                raise RuntimeError("scheduler: the order of arrival is broken")
        partly = [sequence for sequence in self.running.values() if sequence.pending > 1]
        if chunked and partly != ([] if self.partial_prefill is None else [self.partial_prefill]):
            raise RuntimeError("scheduler: more than one prompt is partly read, or another than the one that is known")

    def _forget(self, sequence: Sequence) -> None:
        if self.partial_prefill is sequence:
            self.partial_prefill = None


def _insert(queue: OrderedDict[str, Sequence], sequence: Sequence) -> None:
    """Put a sequence in its place by arrival: mostly the end or the beginning, so that few others must move."""
    older = [other.id for other in queue.values() if other.arrival_number < sequence.arrival_number]
    queue[sequence.id] = sequence
    if len(older) + 1 < len(queue):
        for id in (sequence.id, *reversed(older)):
            queue.move_to_end(id, last=False)
