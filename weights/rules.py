"""How a checkpoint's tensor names map to a decoder's parameters, as data that works in both directions.

A rule names one parameter and the pieces of it: which tensor goes to which part. Loading copies tensors into parts,
export copies parts out to tensors; neither knows any name. No files are opened here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tensor `source` is `parameter[index]`."""

    source: str
    index: Index = ()


@dataclass(frozen=True, slots=True)
class Copy:
    """One tensor is one parameter."""

    target: str
    source: str

    def pieces(self) -> tuple[Piece, ...]:
        return (Piece(self.source),)


@dataclass(frozen=True, slots=True)
class Fuse:
    """Several tensors are `sizes` rows each of one parameter, in order."""

    target: str
    sources: tuple[str, ...]
    sizes: tuple[int, ...]

    def pieces(self) -> tuple[Piece, ...]:
        return tuple(Piece(source, (rows,)) for source, rows in zip(self.sources, _rows(self.sizes), strict=True))


@dataclass(frozen=True, slots=True)
class Stack:
    """Per-expert tensors (`{e}` in the name) fill slice e of one stacked parameter, fused as in `Fuse`."""

    target: str
    sources: tuple[str, ...]
    sizes: tuple[int, ...]
    count: int

    def pieces(self) -> tuple[Piece, ...]:
        return tuple(
            Piece(source.replace("{e}", str(expert)), (expert, rows))
            for expert in range(self.count)
            for source, rows in zip(self.sources, _rows(self.sizes), strict=True)
        )


@dataclass(frozen=True, slots=True)
class Ignore:
    """A tensor that a checkpoint may carry and nobody needs. The reason is for the reader."""

    source: str
    reason: str


Rule = Copy | Fuse | Stack


def _rows(sizes: tuple[int, ...]) -> Iterator[slice]:
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size
