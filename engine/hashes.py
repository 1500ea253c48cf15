"""The names of blocks in the prefix cache: hashes of everything that the keys, values and states behind them depend on.

That is all tokens up to a block's end, the expert counts of their positions and, where the family draws noise, the
noise seed. Counts are hashed position by position because they may depend on where the prompt ends: equal tokens and
equal budgets do not make equal blocks. The hash also covers the request's salt, so that API keys share no blocks. It is
keyed with a random key per process, so that a client cannot construct a collision. Not here: blocks
(`engine/blocks.py`).
"""

import secrets
from array import array
from hashlib import blake2b

import msgspec

from engine.sequence import Sequence
from engine.types import Request


class BlockHashes:
    """Hashes of blocks of `block_size` tokens. `noisy`: the family draws noise, so that only requests with equal noise
    seeds may share blocks."""

    def __init__(self, block_size: int, *, noisy: bool = False) -> None:
        self.block_size, self._noisy = block_size, noisy
        self._key = secrets.token_bytes(32)

    def of(self, sequence: Sequence, full: int) -> list[bytes]:
        """The hashes of at least the first `full` blocks, each over its parent's hash, its tokens and their counts,
        kept on the sequence, whose tokens only grow, and whose counts change only where nothing is computed."""
        hashes, size = sequence.hashes, self.block_size
        for index in range(len(hashes), full):
            parent = hashes[-1] if hashes else self._root(sequence.request)
            start, end = index * size, (index + 1) * size
            counts = msgspec.msgpack.encode(sequence.count_runs(start, end))
            content = parent + counts + array("q", sequence.tokens[start:end]).tobytes()
            hashes.append(blake2b(content, digest_size=16, key=self._key, person=b"block").digest())
        return hashes

    def forget(self, sequence: Sequence, position: int) -> None:
        """Forget the hashes of blocks that reach beyond `position`, where the sequence's counts have changed."""
        del sequence.hashes[position // self.block_size :]

    def _root(self, request: Request) -> bytes:
        """The parent of a sequence's first block: a hash of what the request's keys and values depend on."""
        # All of the budget but its counts is encoded, so that a field added to it later becomes part of the key.
        rest = request.budget.without_counts
        content = msgspec.msgpack.encode((rest, request.noise if self._noisy else None, request.salt))
        return blake2b(content, digest_size=16, key=self._key, person=b"root").digest()
