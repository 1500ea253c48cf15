"""Snapshots of recurrent states: what the prefix cache needs beside blocks where layers keep states of their sequences.

A state is a function of all tokens before it, so a sequence can only start where a state was kept. A snapshot is one
more slot of the tensors that hold the states of running sequences. It is named like the last block before it, by a hash
of everything that both depend on, and is dropped with any of its blocks. The backend takes it in the step that computes
its position; here it is decided where, and in which slot.
Slots and positions are numbers here. Not here: tensors, and how blocks are shared (`engine/blocks.py`).
"""

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

from engine.hashes import BlockHashes
from engine.sequence import Sequence

MIN_DISTANCE_DIVISOR = 16  # snapshots are at least spacing / 16 tokens apart, also those of an answer
SHARED_STARTS = 2  # a snapshot from which so many sequences started is shared
MAX_SHARED = 0.75  # of the slots
AGES_AFTER = 16  # a shared snapshot is ordinary again if it was unused while 16 per slot were dropped


@dataclass(slots=True)
class Snapshot:
    """The slot of a state, the names of all blocks before it, how many sequences started from it, and how many
    snapshots had been displaced when it was last used."""

    slot: int
    blocks: frozenset[bytes]
    starts: int = 0
    used_at: int = 0


class Snapshots:
    """At most `count` snapshots, in the slots from `first_slot` on, of `state_bytes` each.

    If no slot is free, the least recently used snapshot is displaced. A snapshot is *shared* if at least two sequences
    started from it; shared ones are displaced last, so that prompts used once do not displace the snapshot of a common
    beginning. At most three quarters are shared: beyond that the least recently used shared one counts as ordinary. So
    does one that was not used while sixteen times as many as there are slots were displaced.

    A prompt gets snapshots behind its last full block, where its blocks in the prefix cache end, and at every multiple
    of `spacing` tokens. They are at least spacing / 16 apart, and as far from the sequence's start. An answer keeps
    those at multiples of `spacing`, and its latest one at a multiple of spacing / 16, which replaces the one before.

    `size`: tokens of a block. `restore(source, target)` copies the states of one slot to another.
    """

    def __init__(
        self,
        first_slot: int,
        count: int,
        spacing: int,
        size: int,
        restore: Callable[[int, int], None],
        *,
        state_bytes: int = 0,
    ) -> None:
        if count < 1 or spacing < 1:
            raise ValueError(f"need at least one snapshot, and tokens between them; got {count} and {spacing}")
        self.slots = range(first_slot, first_slot + count)
        self._spacing = -(-spacing // size) * size
        self._least = max(1, self._spacing // MIN_DISTANCE_DIVISOR // size) * size
        self._size, self._restore = size, restore
        self._most_shared, self._state_bytes = int(count * MAX_SHARED), state_bytes
        self._ages_after = AGES_AFTER * count
        self._displaced = 0  # snapshots displaced so far
        self._free = list(reversed(self.slots))
        self._kept: OrderedDict[bytes, Snapshot] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def held_bytes(self) -> int:
        """Bytes of the kept snapshots."""
        return len(self._kept) * self._state_bytes

    def longest(self, sequence: Sequence, blocks: int) -> int:
        """The most of the first `blocks` blocks behind which all rows of a sequence have a snapshot; 0 if none. Their
        hashes must be known."""
        return next((count for count in range(blocks, 0, -1) if self._has(sequence, count)), 0)

    def start(self, sequence: Sequence, blocks: int, shared: int) -> None:
        """Copy the snapshot behind `blocks` blocks to the slots of an admitted sequence, and choose the positions of
        its own snapshots. `shared`: how many of its blocks are in the prefix cache, where others begin alike."""
        if blocks:
            for row in sequence.rows:
                digest = row.hashes[blocks - 1]
                self._use(digest, first=sequence.admitted_at is None)
                self._restore(self._kept[digest].slot, row.slot)
        start, end = blocks * self._size, (len(sequence.tokens) - 1) // self._size * self._size
        regular = range((start // self._spacing + 1) * self._spacing, end, self._spacing)
        points: list[int] = []
        for point in (end, shared * self._size, *regular):
            if all(abs(point - other) >= self._least for other in (start, *points)) and start < point <= end:
                points.append(point)
        sequence.snapshot_points = tuple(sorted(points))

    def in_flight(self, sequence: Sequence, running: Iterable[Sequence], counts: range, hashes: BlockHashes) -> bool:
        """Whether a running sequence will leave a snapshot behind one of these counts of blocks, where this one could
        start."""
        for other in running:
            for point in other.snapshot_points:
                if other.computed < point and (count := point // self._size) in counts:
                    wanted = {hashes.of(row, count)[count - 1] for row in sequence.rows} - self._kept.keys()
                    if wanted <= {row.hashes[count - 1] for row in other.rows if len(row.hashes) >= count}:
                        return True
        return False

    def plan(self, sequence: Sequence, start: int, end: int) -> int:
        """Take slots for the snapshots of the tokens from `start` up to `end`, which the next step computes. Returns
        how many other snapshots were displaced for them."""
        before = self._displaced
        wanted = {point for point in sequence.snapshot_points if start < point <= end}
        if end - start == 1 and end > sequence.prompt_length and not end % self._least:
            wanted.add(end)
        for point in sorted(wanted):
            if self._has(sequence, point // self._size):
                continue
            if len(self._free) + len(self._kept) < sequence.row_count:
                break
            while len(self._free) < sequence.row_count:
                self._drop(self._next_to_displace())
                self._displaced += 1
            for row in sequence.rows:
                row.snapshots.append((point, self._free.pop()))
        return self._displaced - before

    def keep(self, sequence: Sequence, blocks: Container[bytes]) -> None:
        """Keep the planned snapshots of tokens that are computed now, if all their blocks are among `blocks`."""
        for row in sequence.rows:
            for point, slot in row.snapshots:
                names = row.hashes[: point // self._size]
                if names[-1] in self._kept or not all(name in blocks for name in names):
                    self._free.append(slot)
                    continue
                self._kept[names[-1]] = Snapshot(slot, frozenset(names))
                if point > sequence.prompt_length:
                    if row.answer_snapshot is not None:
                        self._drop(row.answer_snapshot)
                    row.answer_snapshot = names[-1] if point % self._spacing else None
            row.snapshots.clear()

    def give_back(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Free the slots of the planned snapshots of a sequence that stops running. With `forget` also drop the kept
        snapshots behind its blocks, which other sequences with equal blocks would find."""
        for row in sequence.rows:
            self._free += [slot for _, slot in row.snapshots]
            for digest in row.hashes if forget else ():
                self._drop(digest)

    def forget(self, block: bytes) -> None:
        """Drop the snapshots behind a block that leaves the prefix cache."""
        for digest in [digest for digest, snapshot in self._kept.items() if block in snapshot.blocks]:
            self._drop(digest)

    def clear(self) -> None:
        """Drop all, planned ones included."""
        self._kept.clear()
        self._free = list(reversed(self.slots))

    def check(self, holders: Iterable[Sequence], blocks: Container[bytes]) -> None:
        """Verify that every slot is free, kept or planned, and that the blocks of all snapshots are among `blocks`.

        Raises:
            RuntimeError: one does not hold.
        """
        planned = [slot for sequence in holders for row in sequence.rows for _, slot in row.snapshots]
        kept = [snapshot.slot for snapshot in self._kept.values()]
        if sorted([*self._free, *kept, *planned]) != list(self.slots):
            raise RuntimeError("snapshots: a slot is lost or held twice")
        for digest, snapshot in self._kept.items():
            if digest not in snapshot.blocks or not all(name in blocks for name in snapshot.blocks):
                raise RuntimeError("snapshots: one is kept without its blocks")

    def _has(self, sequence: Sequence, blocks: int) -> bool:
        """Whether there are snapshots behind the first `blocks` blocks of all rows."""
        return all(len(row.hashes) >= blocks and row.hashes[blocks - 1] in self._kept for row in sequence.rows)

    def _use(self, digest: bytes, *, first: bool) -> None:
        """Record a start from a snapshot; `first`: it is its sequence's first start, which is counted. If too many
        snapshots are shared then, the least recently used of them becomes ordinary, even if it belongs to one of two
        rows whose snapshots are only useful together: the other one ages.
        """
        self._kept.move_to_end(digest)
        snapshot = self._kept[digest]
        snapshot.used_at = self._displaced
        if first:
            snapshot.starts += 1
        shared = [snapshot for snapshot in self._kept.values() if self._is_shared(snapshot)]
        if len(shared) > self._most_shared:
            shared[0].starts = 0

    def _is_shared(self, snapshot: Snapshot) -> bool:
        """Whether several sequences started from it, the last one recently. (A conversation that goes on starts only
        once from each of its own snapshots.)"""
        return snapshot.starts >= SHARED_STARTS and self._displaced - snapshot.used_at <= self._ages_after

    def _next_to_displace(self) -> bytes:
        """The least recently used snapshot that is not shared, or of all if all are shared."""
        ordinary = (digest for digest, snapshot in self._kept.items() if not self._is_shared(snapshot))
        return next(ordinary, next(iter(self._kept)))

    def _drop(self, digest: bytes) -> None:
        if snapshot := self._kept.pop(digest, None):
            self._free.append(snapshot.slot)
