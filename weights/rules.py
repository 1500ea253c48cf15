"""How a checkpoint's tensor names map to a decoder's parameters, as data that works in both directions.

A rule names one parameter and the pieces of it: which tensor goes to which part. Loading copies tensors into parts,
export copies parts out to tensors; neither knows any name. No files are opened here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tensor `source` is `parameter[index]`, in a file with its last two dimensions turned, or in another shape."""

    source: str
    index: Index = ()
    transposed: bool = False
    stored: tuple[int, ...] | None = None

    def misfit(self, stored: tuple[int, ...], part: torch.Size) -> str | None:
        """What is wrong with a stored tensor's shape for the parameter's part, or None."""
        wanted = tuple(part) if self.stored is None else self.stored
        if self.transposed:
            wanted = (*wanted[:-2], wanted[-1], wanted[-2])
        return None if stored == wanted else f"{self.source} has shape {stored}, not {wanted}"

    def taken(self, tensor: Tensor) -> Tensor:
        """The stored tensor as the parameter has it."""
        if self.transposed:
            return tensor.transpose(-1, -2)
        return tensor if self.stored is None else tensor.flatten()

    def given(self, part: Tensor) -> Tensor:
        """The parameter's part as it is stored."""
        if self.transposed:
            part = part.transpose(-1, -2)
        return part.contiguous() if self.stored is None else part.reshape(self.stored)


@dataclass(frozen=True, slots=True)
class Copy:
    """One tensor is one parameter."""

    target: str
    source: str
    transposed: bool = False
    stored: tuple[int, ...] | None = None

    def pieces(self) -> tuple[Piece, ...]:
        return (Piece(self.source, (), self.transposed, self.stored),)


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


def renamed(rule: Rule, name: Callable[[str], str]) -> Rule:
    """The same rule for tensors whose names are `name` of its own."""
    if isinstance(rule, Copy):
        return replace(rule, source=name(rule.source))
    return replace(rule, sources=tuple(name(source) for source in rule.sources))


def _rows(sizes: tuple[int, ...]) -> Iterator[slice]:
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size
