"""The block manager: which KV-cache block belongs to which sequence, and which full blocks the prefix cache can share.

A sequence of self-contrast decoding has two rows with blocks of their own, always for the same positions.

Shared are blocks with equal hashes (`engine/hashes.py`); where layers keep states, a prefix ends where there is a
snapshot of these (`engine/snapshots.py`).
Blocks are numbers here. Not here: which of them are free (`engine/block_pool.py`), and what one contains
(`model/shapes/memory.py`).
"""

from collections.abc import Iterable, Set

from engine.block_pool import BlockPool, require
from engine.hashes import BlockHashes
from engine.plan import Chunk
from engine.sequence import Sequence
from engine.snapshots import Snapshots


class BlockManager:
    """Allocates `total` blocks of `block_size` tokens. Every call keeps the invariants of `check`.

    `noisy`: the family draws noise, so that only requests with equal noise seeds may share blocks. `snapshots`: for
    models with recurrent states, which have no prefix cache without snapshots.
    """

    def __init__(
        self,
        total: int,
        block_size: int,
        *,
        prefix_cache: bool = True,
        noisy: bool = False,
        snapshots: Snapshots | None = None,
    ) -> None:
        if total < 1 or block_size < 1:
            raise ValueError(f"need at least one block of one token, got {total} blocks of {block_size}")
        self.total, self.block_size = total, block_size
        self.prefix_cache, self.snapshots = prefix_cache, snapshots
        self._hashes = BlockHashes(block_size, noisy=noisy)
        self._holders: dict[str, Sequence] = {}
        self._slots: list[int] = []  # free slots among those allocated so far (0, 1, 2, …)
        self._slots_used = 0
        self._pool = BlockPool(total, self._forget_snapshots)

    @property
    def free(self) -> int:
        """Blocks that can be allocated now, including those that still cache a prefix."""
        return self._pool.free

    @property
    def used(self) -> int:
        """Blocks held by at least one sequence."""
        return self.total - self.free

    @property
    def holders(self) -> Set[str]:
        """Ids of the sequences that hold blocks."""
        return self._holders.keys()

    def blocks_for(self, tokens: int) -> int:
        """The number of blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def token_capacity(self, sequence: Sequence) -> int:
        """How many more tokens of this sequence fit into its own and all free blocks."""
        return (len(sequence.blocks) + self.free // sequence.row_count) * self.block_size - sequence.computed

    def admit(self, sequence: Sequence, spare: int = 0) -> bool:
        """Give a sequence without blocks its cached prefix, if all its tokens would fit and leave `spare` blocks free.

        On success `sequence.computed` is the length of the prefix, always less than the whole sequence: the last
        token must be computed to get logits. The other blocks are not allocated yet (see `reserve`).
        """
        hits_of_rows, shared = self._lookup_rows(sequence)
        hits = len(hits_of_rows[0])
        unused_hits = {block for found in hits_of_rows for block in found if not self._pool.is_held(block)}
        missing = sequence.row_count * (self.blocks_for(len(sequence.tokens)) - hits)
        if missing + spare > self.free - len(unused_hits):
            return False
        self._hold(sequence)
        for row, found in zip(sequence.rows, hits_of_rows, strict=True):
            for block in found:
                self._pool.acquire(block)
                row.blocks.append(block)
            self._hashes.of(row, self._shareable(row))  # `prefix_in_flight` compares them
            row.published = hits
        sequence.computed = hits * self.block_size
        if self.snapshots is not None:
            self.snapshots.start(sequence, hits, shared)
        return True

    def uses_prefix_cache(self, sequence: Sequence) -> bool:
        """Whether a sequence may start with cached blocks. A prompt whose log-probabilities are wanted may not."""
        return self.prefix_cache and sequence.request.sampling.prompt_logprobs is None

    def uncached_tokens(self, sequence: Sequence) -> int:
        """The number of tokens of a sequence without blocks that are not in the prefix cache."""
        return len(sequence.tokens) - len(self._lookup_rows(sequence)[0][0]) * self.block_size

    def prefix_in_flight(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Whether a running sequence computes the first block that this one would have to compute. With two rows:
        whether the blocks of both are being computed or cached. With snapshots: whether a running sequence will make
        one at a later position of this sequence's prefix."""
        cached, most = len(self._lookup_rows(sequence)[0][0]), self._shareable(sequence)
        if cached >= most:
            return False
        if self.snapshots is not None:
            return self.snapshots.in_flight(sequence, running, range(cached + 1, most + 1), self._hashes)
        # A hash covers all tokens before it, so an equal one has the same index.
        next_hashes = {self._hashes.of(row, cached + 1)[cached] for row in sequence.rows}
        wanted = {digest for digest in next_hashes if self._pool.find(digest) is None}
        rows = (row for other in running for row in other.rows)
        found = {row.hashes[cached] for row in rows if row.published <= cached < len(row.hashes)}
        return wanted <= found

    def forget_hashes(self, sequence: Sequence, position: int) -> None:
        """Forget the hashes of blocks that reach beyond `position`, where the sequence's counts have changed."""
        self._hashes.forget(sequence, position)

    def reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Allocate blocks until a sequence's first `tokens` tokens are covered. False: too few are free, none taken."""
        if tokens <= len(sequence.blocks) * self.block_size:
            return True  # the usual case: most tokens do not start a block
        missing = self.blocks_for(tokens) - len(sequence.blocks)
        if missing * sequence.row_count > self.free:
            return False
        self._hold(sequence)
        for row in sequence.rows:
            for _ in range(missing):
                row.blocks.append(self._pool.allocate())
        return True

    def publish(self, sequence: Sequence) -> None:
        """Put every full block whose tokens are all computed into the prefix cache. If two held blocks are equal, only
        the first one is put there."""
        if not self.prefix_cache:
            return
        full = sequence.computed // self.block_size
        if full == sequence.published:
            return
        for row in sequence.rows:
            hashes = self._hashes.of(row, full)
            for index in range(row.published, full):
                self._pool.publish(row.blocks[index], hashes[index])
            row.published = full
        if self.snapshots is not None:
            self.snapshots.keep(sequence, self._pool.hashes)

    def plan_snapshots(self, plan: Iterable[Chunk]) -> int:
        """Take slots for the snapshots that a step will make. Returns how many others were displaced for them."""
        if self.snapshots is None:
            return 0
        return sum(self.snapshots.plan(each.sequence, each.start, each.start + each.length) for each in plan)

    def release(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Free all blocks of a sequence. With `forget` (the sequence failed) they leave the prefix cache as well."""
        if self.snapshots is not None:
            self.snapshots.give_back(sequence, forget=forget)
        # The end of a prefix is useless without its beginning: free it first, so that it is evicted first.
        for row in sequence.rows:
            for block in reversed(row.blocks):
                if forget:
                    self._pool.forget(block)
                self._pool.release(block)
        if self._holders.pop(sequence.id, None):
            self._slots += [row.slot for row in sequence.rows]
        _empty(sequence)

    def clear(self) -> None:
        """Free the blocks of all sequences and empty the prefix cache: a fresh start after a fault."""
        for sequence in self._holders.values():
            _empty(sequence)
        self._holders.clear()
        self._slots.clear()
        self._slots_used = 0
        self._pool.clear()
        if self.snapshots is not None:
            self.snapshots.clear()

    def check(self) -> None:
        """Verify every invariant.

        Raises:
            RuntimeError: one does not hold; the message names it.
        """
        held = [0] * self.total
        slots = list(self._slots)
        for sequence in self._holders.values():
            for row in sequence.rows:
                require(len(set(row.blocks)) == len(row.blocks), f"{row.id} holds a block twice")
                require(len(row.blocks) == len(sequence.blocks), f"the rows of {row.id} hold unequally many blocks")
                require(sequence.computed <= len(row.blocks) * self.block_size, f"{row.id} computed too much")
                slots.append(row.slot)
                for block in row.blocks:
                    held[block] += 1
        require(sorted(slots) == list(range(self._slots_used)), "a slot is lost or held twice")
        self._pool.check(held)
        if self.snapshots is not None:
            self.snapshots.check(self._holders.values(), self._pool.hashes)

    def _lookup_rows(self, sequence: Sequence) -> tuple[list[list[int]], int]:
        """For each row of a sequence the cached blocks from which it can start, equally many, and how many cached
        blocks there are. With snapshots a row can only start behind a snapshot, so the first number may be smaller."""
        found = [self._lookup(row) for row in sequence.rows]
        shared = min(map(len, found))
        hits = shared if self.snapshots is None else self.snapshots.longest(sequence, shared)
        return [blocks[:hits] for blocks in found], shared

    def _lookup(self, row: Sequence) -> list[int]:
        """The cached blocks that hold a row's beginning. Hashes are computed one block beyond the last hit."""
        hits: list[int] = []
        for index in range(self._shareable(row)):
            digest = self._hashes.of(row, index + 1)[index]
            block = self._pool.find(digest)
            if block is None:
                break
            hits.append(block)
        return hits

    def _shareable(self, sequence: Sequence) -> int:
        """How many full blocks of a sequence may come from the cache: all that leave one token to compute."""
        if not self.uses_prefix_cache(sequence):
            return 0
        return (len(sequence.tokens) - 1) // self.block_size

    def _hold(self, sequence: Sequence) -> None:
        """Make a sequence a holder of blocks, with a slot for each row."""
        if sequence.id in self._holders:
            return
        self._holders[sequence.id] = sequence
        for row in sequence.rows:
            if not self._slots:
                self._slots.append(self._slots_used)
                self._slots_used += 1
            row.slot = self._slots.pop()

    def _forget_snapshots(self, digest: bytes) -> None:
        if self.snapshots is not None:
            self.snapshots.forget(digest)


def _empty(sequence: Sequence) -> None:
    sequence.computed = 0
    for row in sequence.rows:
        row.blocks.clear()
        row.slot, row.published = -1, 0
        row.snapshots.clear()
        row.snapshot_points, row.answer_snapshot = (), None
