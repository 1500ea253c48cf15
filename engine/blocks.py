"""Paged KV memory as numbers: which block belongs to which sequence, and which full blocks can be shared as a prefix.

A block's hash covers everything that its keys and values depend on: all tokens up to its end, the expert budget and,
where the family draws noise, the noise seed; and the request's salt, which keeps apart those who must not share. The
hash is keyed with a random key per process, so collisions cannot be aimed at.
It refuses to know what a block contains, and when sequences run.
"""

import secrets
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Set
from hashlib import blake2b

import msgspec

from engine.sequence import Sequence
from engine.types import Request


class BlockManager:
    """Hands out `total` blocks of `block_size` tokens. Every call leaves the invariants of `check` intact.

    `noisy`: the family draws noise, so only requests with equal noise seeds may share blocks.
    """

    def __init__(self, total: int, block_size: int, *, prefix_cache: bool = True, noisy: bool = False) -> None:
        if total < 1 or block_size < 1:
            raise ValueError(f"need at least one block of one token, got {total} blocks of {block_size}")
        self.total, self.block_size = total, block_size
        self.prefix_cache, self._noisy = prefix_cache, noisy
        self._key = secrets.token_bytes(32)
        self._holders: dict[str, Sequence] = {}
        self._slots: list[int] = []  # free among those ever handed out: 0, 1, 2, …
        self._references = [0] * total
        self._hash_of: list[bytes | None] = [None] * total
        self._block_of: dict[bytes, int] = {}
        self._empty = list(reversed(range(total)))  # free, nothing to remember
        self._cached: OrderedDict[int, None] = OrderedDict()  # free but still findable, least recently used first

    @property
    def free(self) -> int:
        """Blocks that can be handed out now, those that still cache a prefix included."""
        return len(self._empty) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks held by at least one sequence."""
        return self.total - self.free

    @property
    def holders(self) -> Set[str]:
        """Ids of the sequences that hold blocks."""
        return self._holders.keys()

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-tokens // self.block_size)

    def token_capacity(self, sequence: Sequence) -> int:
        """How many more tokens of this sequence could be computed with its own and all free blocks."""
        return (len(sequence.blocks) + self.free) * self.block_size - sequence.computed

    def admit(self, sequence: Sequence, spare: int = 0) -> bool:
        """Give a sequence without blocks its cached prefix, if all its tokens would fit and leave `spare` blocks free.

        On success `sequence.computed` is the length of the prefix, always less than the whole sequence: the last
        token must be computed to get logits. The other blocks are not taken yet (`reserve`).
        """
        hits = self._lookup(sequence)
        idle = sum(self._references[block] == 0 for block in hits)
        if self.blocks_for(len(sequence.tokens)) - len(hits) + spare > self.free - idle:
            return False
        for block in hits:
            self._cached.pop(block, None)
            self._hold(sequence, block)
        self._chain(sequence, self._shareable(sequence))  # for `prefix_in_flight`: what it is going to compute
        sequence.published = len(hits)
        sequence.computed = len(hits) * self.block_size
        return True

    def uses_prefix_cache(self, sequence: Sequence) -> bool:
        """Whether a sequence may begin with blocks that others computed: not one whose prompt is to be scored."""
        return self.prefix_cache and sequence.request.sampling.prompt_logprobs is None

    def uncached_tokens(self, sequence: Sequence) -> int:
        """How many tokens of a sequence without blocks are not in the prefix cache."""
        return len(sequence.tokens) - len(self._lookup(sequence)) * self.block_size

    def prefix_in_flight(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Whether the first block that this sequence would have to compute is just being computed by another."""
        known = len(self._lookup(sequence))
        if known >= self._shareable(sequence):
            return False
        digest = sequence.hashes[known]  # names all tokens before it too, so it is the other's at the same place
        return any(
            other.published <= known < len(other.hashes) and other.hashes[known] == digest
            for other in running
            if other.pending > 1
        )

    def reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Extend a sequence's blocks to cover its first `tokens` tokens: all of them, or (False) none."""
        missing = self.blocks_for(tokens) - len(sequence.blocks)
        if missing <= 0:
            return True  # for most tokens of most sequences
        if missing > self.free:
            return False
        for _ in range(missing):
            self._hold(sequence, self._take())
        return True

    def publish(self, sequence: Sequence) -> None:
        """Make every full block whose tokens are all computed findable. The first of two equal blocks is kept."""
        if not self.prefix_cache:
            return
        full = sequence.computed // self.block_size
        if full == sequence.published:
            return
        hashes = self._chain(sequence, full)
        for index in range(sequence.published, full):
            block, digest = sequence.blocks[index], hashes[index]
            if self._hash_of[block] is None and digest not in self._block_of:
                self._hash_of[block] = digest
                self._block_of[digest] = block
        sequence.published = full

    def release(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Give all blocks back. With `forget` (the sequence failed) nobody will find their contents again."""
        # The end of a prefix is of use only with its beginning: free it first, so that it is evicted first.
        for block in reversed(sequence.blocks):
            if forget:
                self._forget(block)
            self._drop(block)
        if self._holders.pop(sequence.id, None):
            self._slots.append(sequence.slot)
        _empty(sequence)

    def clear(self) -> None:
        """Take all blocks from everyone and forget all contents: a fresh start after a fault."""
        for sequence in self._holders.values():
            _empty(sequence)
        self._holders.clear()
        self._slots.clear()
        self._block_of.clear()
        self._cached.clear()
        self._references = [0] * self.total
        self._hash_of = [None] * self.total
        self._empty = list(reversed(range(self.total)))

    def check(self) -> None:
        """Verify every invariant.

        Raises:
            RuntimeError: one does not hold; the message names it.
        """
        held = [0] * self.total
        for sequence in self._holders.values():
            _require(len(set(sequence.blocks)) == len(sequence.blocks), f"{sequence.id} holds a block twice")
            _require(sequence.computed <= len(sequence.blocks) * self.block_size, f"{sequence.id} computed too much")
            for block in sequence.blocks:
                held[block] += 1
        slots = [*self._slots, *(sequence.slot for sequence in self._holders.values())]
        _require(sorted(slots) == list(range(len(slots))), "a slot is lost or held twice")
        free = [*self._empty, *self._cached]
        _require(held == self._references, "reference counts differ from holders")
        _require(len(set(free)) == len(free), "a block is free twice")
        _require(all(held[block] == 0 for block in free), "a block is both free and held")
        _require(len(free) + sum(count > 0 for count in held) == self.total, "a block is neither free nor held")
        named = {digest: block for block, digest in enumerate(self._hash_of) if digest is not None}
        _require(named == self._block_of, "the two hash maps differ")
        _require(len(named) == sum(digest is not None for digest in self._hash_of), "two blocks have one hash")
        _require(all(self._hash_of[block] is None for block in self._empty), "an empty block has a hash")
        _require(all(self._hash_of[block] is not None for block in self._cached), "a cached block has no hash")

    def _lookup(self, sequence: Sequence) -> list[int]:
        """Blocks with the beginning of a sequence. It is hashed as far as it is found, and one block further."""
        hits: list[int] = []
        for index in range(self._shareable(sequence)):
            block = self._block_of.get(self._chain(sequence, index + 1)[index])
            if block is None:
                break
            hits.append(block)
        return hits

    def _shareable(self, sequence: Sequence) -> int:
        """How many full blocks of a sequence others may have computed: all that leave a token to compute. None where
        the prompt is to be scored, which needs the logits of every token."""
        return (len(sequence.tokens) - 1) // self.block_size if self.uses_prefix_cache(sequence) else 0

    def _chain(self, sequence: Sequence, full: int) -> list[bytes]:
        """The hashes of at least the first `full` blocks, kept on the sequence: tokens only ever grow."""
        hashes, size = sequence.hashes, self.block_size
        for index in range(len(hashes), full):
            parent = hashes[-1] if hashes else self._root(sequence.request)
            tokens = array("q", sequence.tokens[index * size : (index + 1) * size]).tobytes()
            hashes.append(blake2b(parent + tokens, digest_size=16, key=self._key, person=b"block").digest())
        return hashes

    def _root(self, request: Request) -> bytes:
        # The whole budget is encoded, so a field added to it later is part of the key without a change here.
        content = msgspec.msgpack.encode((request.budget, request.noise if self._noisy else None, request.salt))
        return blake2b(content, digest_size=16, key=self._key, person=b"root").digest()

    def _take(self) -> int:
        if self._empty:
            return self._empty.pop()
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _hold(self, sequence: Sequence, block: int) -> None:
        if sequence.id not in self._holders:
            self._holders[sequence.id] = sequence
            sequence.slot = self._slots.pop() if self._slots else len(self._holders) - 1
        self._references[block] += 1
        sequence.blocks.append(block)

    def _drop(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block]:
            return
        if self._hash_of[block] is None:
            self._empty.append(block)
        else:
            self._cached[block] = None

    def _forget(self, block: int) -> None:
        digest, self._hash_of[block] = self._hash_of[block], None
        if digest is not None:
            del self._block_of[digest]


def _empty(sequence: Sequence) -> None:
    sequence.blocks.clear()
    sequence.slot = -1
    sequence.computed = sequence.published = 0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"block manager: {message}")
