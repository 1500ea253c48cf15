"""What a layer keeps of a sequence between steps, and its size: pages that grow with it, or a state that does not.

Plain values; the tensors are made by a backend (`Runnable.cache`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

STATE_BYTES = 4  # states are float32 whatever the model's dtype


@dataclass(frozen=True, slots=True)
class PagedMemory:
    """Memory that grows with the sequence: per token `heads` keys of `key_width`, and values unless they are the first
    columns of the keys."""

    heads: int
    key_width: int
    values: bool = True
    per_sequence = 0

    @property
    def per_token(self) -> int:
        """Elements, in the model's dtype."""
        return self.rows_per_token * self.key_width

    @property
    def rows_per_token(self) -> int:
        """Keys and values."""
        return (1 + self.values) * self.heads

    def tensor_shape(self, tokens: int, slots: int) -> tuple[int, ...]:
        """[2, tokens, G, C] for keys and values, or [1, tokens, G, C] where values are part of the keys."""
        return 1 + self.values, tokens, self.heads, self.key_width


@dataclass(frozen=True, slots=True)
class StateMemory:
    """Memory of fixed size per sequence: `size` float32 values. Another sequence can only use a copy."""

    size: int
    per_token = 0
    rows_per_token = 0

    @property
    def per_sequence(self) -> int:
        """Elements, float32."""
        return self.size

    def tensor_shape(self, tokens: int, slots: int) -> tuple[int, ...]:
        """[slots, size]."""
        return slots, self.size


Memory = PagedMemory | StateMemory


def bytes_per_block(memory: Iterable[Memory], block_size: int, element_bytes: int, scale_bytes: int = 0) -> int:
    """Bytes of one block of tokens over all layers. `scale_bytes`: of the scale of each key and value, if they are
    quantised."""
    per_token = sum(kind.per_token * element_bytes + kind.rows_per_token * scale_bytes for kind in memory)
    return per_token * block_size


def bytes_per_sequence(memory: Iterable[Memory]) -> int:
    """Memory of one running sequence's states over all layers."""
    return sum(kind.per_sequence for kind in memory) * STATE_BYTES
