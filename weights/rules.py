"""How a checkpoint's tensor names map to a decoder's parameters, as data that works in both directions.

A rule names one parameter and its parts: which tensor is which part. Loading copies tensors into parts, export copies
parts to tensors; neither has names of its own. This file opens no files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Tensor `source`, or these `rows` of it, is `parameter[index]`; in the file transposed in its last two dimensions,
    or in another shape."""

    source: str
    index: Index = ()
    transposed: bool = False
    stored: tuple[int, ...] | None = None
    rows: range | None = None

    def shape_error(self, stored: tuple[int, ...], part: torch.Size) -> str | None:
        """The fault of a stored tensor's shape for the parameter's part, or None."""
        wanted = tuple(part) if self.stored is None else self.stored
        if self.transposed:
            wanted = (*wanted[:-2], wanted[-1], wanted[-2])
        return None if stored == wanted else f"{self.source} has shape {stored}, not {wanted}"

    def to_parameter(self, tensor: Tensor) -> Tensor:
        """A stored tensor in the parameter's layout."""
        if self.rows is not None:
            tensor = tensor[self.rows.start : self.rows.stop]
        if self.transposed:
            return tensor.transpose(-1, -2)
        return tensor if self.stored is None else tensor.flatten()

    def to_stored(self, part: Tensor) -> Tensor:
        """A parameter's part in the layout of the file."""
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

    def parts(self) -> tuple[TensorPart, ...]:
        return (TensorPart(self.source, (), self.transposed, self.stored),)


@dataclass(frozen=True, slots=True)
class Fuse:
    """Several tensors are `sizes` rows each of one parameter, in order."""

    target: str
    sources: tuple[str, ...]
    sizes: tuple[int, ...]

    def parts(self) -> tuple[TensorPart, ...]:
        slices = zip(self.sources, _rows(self.sizes), strict=True)
        return tuple(TensorPart(source, (rows,)) for source, rows in slices)


@dataclass(frozen=True, slots=True)
class Stack:
    """Per-expert tensors (`{e}` in the name) fill slice e of one stacked parameter, fused as in `Fuse`."""

    target: str
    sources: tuple[str, ...]
    sizes: tuple[int, ...]
    count: int

    def parts(self) -> tuple[TensorPart, ...]:
        return tuple(part for expert in range(self.count) for part in self._parts_of(expert))

    def _parts_of(self, expert: int) -> Iterator[TensorPart]:
        for source, rows in zip(self.sources, _rows(self.sizes), strict=True):
            yield TensorPart(source.replace("{e}", str(expert)), (expert, rows))


@dataclass(frozen=True, slots=True)
class Ignore:
    """A tensor of a checkpoint that is not needed. The reason is documentation. With `copy_of`, it must equal this
    parameter."""

    source: str
    reason: str
    copy_of: str = ""


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
