"""The pool of KV-cache blocks: which are free, how many sequences hold each, and which full ones are found by a hash.

A free block that has a hash stays in the prefix cache until no other one is free; the least recently used goes first.
Blocks are numbers here. Not here: which sequence holds which block (`engine/blocks.py`), and what a hash
covers (`engine/hashes.py`).
"""

from collections import OrderedDict
from collections.abc import Callable, Container


class BlockPool:
    """Blocks 0 to `total` - 1. `on_forget` is called with each hash whose block leaves the prefix cache."""

    def __init__(self, total: int, on_forget: Callable[[bytes], None]) -> None:
        self.total, self._on_forget = total, on_forget
        self.clear()

    def clear(self) -> None:
        """Make all blocks free and without a hash."""
        self._references = [0] * self.total
        self._hash_of: list[bytes | None] = [None] * self.total
        self._block_of: dict[bytes, int] = {}
        self._empty = list(reversed(range(self.total)))  # free, without contents to reuse
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, but with a hash; least recently used first

    @property
    def free(self) -> int:
        """Blocks that can be allocated now, including those that still cache a prefix."""
        return len(self._empty) + len(self._cached)

    @property
    def hashes(self) -> Container[bytes]:
        """The hashes of all blocks that have one."""
        return self._block_of.keys()

    def find(self, digest: bytes) -> int | None:
        """The block with this hash, if there is one."""
        return self._block_of.get(digest)

    def is_held(self, block: int) -> bool:
        """Whether a sequence holds the block."""
        return self._references[block] > 0

    def acquire(self, block: int) -> None:
        """Hold a block once more."""
        self._cached.pop(block, None)
        self._references[block] += 1

    def allocate(self) -> int:
        """Hold a free block; one of the prefix cache, the least recently used, only if no other is free."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self.forget(block)
        self._references[block] = 1
        return block

    def release(self, block: int) -> None:
        """Hold a block once less."""
        self._references[block] -= 1
        if self._references[block]:
            return
        if self._hash_of[block] is None:
            self._empty.append(block)
        else:
            self._cached[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        """Give a hash to a held block, unless another held block has the same hash."""
        other = self._block_of.get(digest)
        if self._hash_of[block] is not None or (other is not None and self.is_held(other)):
            return
        if other is not None:
            self._hash_of[other] = None
            del self._cached[other]
            self._empty.append(other)
        self._hash_of[block] = digest
        self._block_of[digest] = block

    def forget(self, block: int) -> None:
        """Take a block that is held, or is being allocated, out of the prefix cache."""
        digest, self._hash_of[block] = self._hash_of[block], None
        if digest is not None:
            del self._block_of[digest]
            self._on_forget(digest)

    def check(self, held: list[int]) -> None:
        """Verify the invariants; `held`: how many sequences hold each block.

        Raises:
            RuntimeError: one does not hold; the message names it.
        """
        free = [*self._empty, *self._cached]
        require(held == self._references, "reference counts differ from holders")
        require(len(set(free)) == len(free), "a block is free twice")
        require(all(held[block] == 0 for block in free), "a block is both free and held")
        used = sum(count > 0 for count in held)
        require(len(free) + used == self.total, "a block is neither free nor held")
        hashed = {digest: block for block, digest in enumerate(self._hash_of) if digest is not None}
        require(hashed == self._block_of, "the two hash maps differ")
        require(len(hashed) == sum(digest is not None for digest in self._hash_of), "two blocks have one hash")
        require(all(self._hash_of[block] is None for block in self._empty), "an empty block has a hash")
        require(all(self._hash_of[block] is not None for block in self._cached), "a cached block has no hash")


def require(condition: bool, message: str) -> None:
    """Raises RuntimeError with the message unless the condition holds."""
    if not condition:
        raise RuntimeError(f"block manager: {message}")
