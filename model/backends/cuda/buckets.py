"""Buckets: the shapes to which decoding steps are padded, so that one graph serves every step of a bucket.

Numbers of tokens are rounded up to 1, 2, 4, 8, then to every 8 until 64, then to every 16 until 256; contexts to 1, 2,
4 ... segments of 1,024 keys; counts to the trained one, and above it to its doubles. What is added is padding (see
`padding.py`), which changes no result. No tensors here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from model.backends.cuda.inputs import StepShape
from model.backends.cuda.kernels.attend import PAGE, SEGMENT

TOKENS = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16))


@dataclass(frozen=True, slots=True)
class Buckets:
    """The buckets of one model: of the positions it serves, and of its trained and its largest count."""

    length: int
    trained: int
    most: int

    def of(self, shape: StepShape) -> StepShape | None:
        """The bucket of a step in which every sequence has one new token; None: another step, or too many tokens."""
        decodes = shape.tokens == shape.sequences == shape.tiles and shape.tile_rows == 1 and shape.rows <= shape.tokens
        tokens = tokens_bucket(shape.tokens)
        if not decodes or tokens is None:
            return None
        segments = self._segments(max(shape.longest, shape.blocks * PAGE))
        return replace(
            shape,
            tokens=tokens,
            rows=tokens,
            sequences=tokens,
            tiles=tokens,
            blocks=segments * (SEGMENT // PAGE),
            longest=segments * SEGMENT,
            k_max=self._count(shape.k_max),
        )

    def _segments(self, context: int) -> int:
        """No more than what is served has, but enough for the context."""
        needed, served = -(-context // SEGMENT), -(-self.length // SEGMENT)
        return max(needed, min(_power_of_two(needed), served))

    def _count(self, count: int) -> int:
        """A count above the largest is its own bucket: what it means is not for this file to say."""
        return next((bucket for bucket in self._counts() if count <= bucket), count)

    def _counts(self) -> Iterator[int]:
        count = self.trained
        while 0 < count < self.most:
            yield count
            count *= 2
        yield self.most


@cache
def tokens_bucket(tokens: int) -> int | None:
    """The bucket of so many tokens; None if there are none, or more than the largest has."""
    return next((bucket for bucket in TOKENS if 0 < tokens <= bucket), None)


def _power_of_two(number: int) -> int:
    """The lowest that is not below the number."""
    return 1 << max(0, number - 1).bit_length()
