"""The scheduler's two queues, waiting and running sequences, each in order of arrival.

They plan nothing, and know of blocks only which sequences hold some.
"""

from collections import OrderedDict
from collections.abc import Set
from itertools import chain, islice

from engine.sequence import Sequence

WINDOW = 64  # the oldest wait is searched among the first 64: `waiting` is not sorted by `waiting_since`


class Queues:
    """Waiting and running sequences. At most one is partly prefilled: `partial_prefill`. Sequences that overtook it
    come after it in the order of arrival, and so are preempted before it is."""

    def __init__(self) -> None:
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.running: OrderedDict[str, Sequence] = OrderedDict()
        self.partial_prefill: Sequence | None = None  # runs, with more than one token still to be computed
        self.held: set[str] = set()  # running, and left out of the plan that is made
        self.running_rows = 0  # of a batch, taken by the running sequences
        self._count = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, the youngest of all."""
        self._count += 1
        sequence.arrival_number = self._count
        self.waiting[sequence.id] = sequence

    def start(self, sequence: Sequence) -> None:
        """Move a waiting sequence to the running ones."""
        _insert(self.running, self.waiting.pop(sequence.id))
        self.running_rows += sequence.row_count

    def requeue(self, sequence: Sequence, now: float) -> None:
        """Move a running sequence back to the waiting ones."""
        sequence.waiting_since = now
        _insert(self.waiting, self.running.pop(sequence.id))
        self.running_rows -= sequence.row_count
        self._forget(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that ends."""
        if self.running.pop(sequence.id, None) is not None:
            self.running_rows -= sequence.row_count
        self.waiting.pop(sequence.id, None)
        self._forget(sequence)

    def next_ready(self, count: int) -> tuple[Sequence, ...]:
        """The first `count` waiting sequences that do not wait for a grammar mask."""
        return tuple(islice((sequence for sequence in self.waiting.values() if sequence.ready), count))

    def record_prefill(self, sequence: Sequence) -> None:
        """Update `partial_prefill` after a chunk of a sequence was computed. A prompt with one token left counts as a
        sequence that decodes."""
        if sequence.pending > 1:
            self.partial_prefill = sequence
        else:
            self._forget(sequence)

    def has_plain(self) -> bool:
        """Whether a sequence without a grammar runs or is among the first that wait."""
        first = chain(self.running.values(), islice(self.waiting.values(), WINDOW))
        return any(sequence.matcher is None for sequence in first)

    @property
    def has_suspects(self) -> bool:
        """Whether a sequence is still to be computed up to where a shared step with it has failed."""
        return any(sequence.suspected for sequence in chain(self.running.values(), self.waiting.values()))

    @property
    def youngest(self) -> Sequence:
        """The running sequence that arrived last: the one to preempt when blocks run out."""
        return next(reversed(self.running.values()))

    def longest_wait(self, now: float) -> float:
        """Seconds for which the oldest waiting sequence has waited for its next token; 0 if none waits."""
        partial = () if self.partial_prefill is None else (self.partial_prefill,)
        not_prefilled = chain(partial, islice(self.waiting.values(), WINDOW))
        return now - min((sequence.waiting_since for sequence in not_prefilled), default=now)

    def check(self, holders: Set[str], chunked: bool) -> None:
        """Verify that all `holders` of blocks run, the order of arrival, and `partial_prefill`.

        Raises:
            RuntimeError: one does not hold.
        """
        if not holders <= self.running.keys():
            raise RuntimeError("scheduler: blocks are held by a sequence that does not run")
        if self.running_rows != sum(sequence.row_count for sequence in self.running.values()):
            raise RuntimeError("scheduler: the rows of running sequences are miscounted")
        for queue in (self.running, self.waiting):
            numbers = [sequence.arrival_number for sequence in queue.values()]
            if numbers != sorted(numbers):
                raise RuntimeError("scheduler: the order of arrival is broken")
        partial = [sequence for sequence in self.running.values() if sequence.pending > 1]
        if chunked and partial != ([] if self.partial_prefill is None else [self.partial_prefill]):
            raise RuntimeError("scheduler: more than one prompt is partly prefilled, or another one than is recorded")

    def _forget(self, sequence: Sequence) -> None:
        if self.partial_prefill is sequence:
            self.partial_prefill = None


def _insert(queue: OrderedDict[str, Sequence], sequence: Sequence) -> None:
    """Insert a sequence in order of arrival. The position is usually the end or the start, so few others move."""
    older = [other.id for other in queue.values() if other.arrival_number < sequence.arrival_number]
    queue[sequence.id] = sequence
    if len(older) + 1 < len(queue):
        for id in (sequence.id, *reversed(older)):
            queue.move_to_end(id, last=False)
