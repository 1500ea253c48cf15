"""How a tensor of Hugging Face's layout is made of those of a GGUF file: a whole one, an expert of one, or two joined.

It knows no names.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from model.grouped import Grouped
from weights.files import Stored
from weights.gguf.blocks import dense, dtype_of, grouped, grouped_bytes
from weights.gguf.reader import GgufFile


class Part(Protocol):
    """One tensor as a family's rules want it."""

    def stored(self, file: GgufFile) -> Stored: ...

    def dense(self, file: GgufFile) -> Tensor:
        """The values, in the dtype and the shape of `stored`."""
        ...

    def grouped(self, file: GgufFile) -> Grouped | None:
        """The values with outputs and inputs as the last axes, also where `stored` has them transposed."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor of the file.

    Attributes:
        expert: of a tensor with all experts, the one that is meant.
        heads: of queries or keys whose heads have pairs of rotary rows as neighbours; moved back to halves.
        rows: those of queries, keys and values in one that are meant.
        transposed: the rules want [in, out].
        shape: the one that the rules want, where the file leaves out an axis of one.
    """

    name: str
    expert: int | None = None
    heads: int = 0
    rows: range | None = None
    transposed: bool = False
    shape: tuple[int, ...] | None = None

    def stored(self, file: GgufFile) -> Stored:
        entry = file.tensors[self.name]
        shape = self._shape(file)
        if self.rows is not None:
            shape = (len(self.rows[: shape[0]]), *shape[1:])
        size = 0 if self.shape else grouped_bytes(entry.type, shape)
        if self.transposed and len(shape) > 1:
            shape = (*shape[:-2], shape[-1], shape[-2])
        start = entry.start + (self.expert or 0) * self._size(file)
        return Stored(file.paths[entry.part].name, start, dtype_of(entry.type), shape, size)

    def dense(self, file: GgufFile) -> Tensor:
        values = dense(file.tensors[self.name].type, self._data(file), self._shape(file))
        order = self._order(file)
        if order is not None:
            values = values[order]
        return values.transpose(-1, -2) if self.transposed else values

    def grouped(self, file: GgufFile) -> Grouped | None:
        if self.shape:
            return None
        found = grouped(file.tensors[self.name].type, self._data(file), self._shape(file))
        order = self._order(file)
        return found if found is None or order is None else found.rows(order)

    def _order(self, file: GgufFile) -> Tensor | None:
        """Which rows become the tensor's, in its order; None for all as they are."""
        if self.rows is None and not self.heads:
            return None
        rows = torch.arange(self._shape(file)[0])
        if self.rows is not None:
            rows = rows[self.rows.start : self.rows.stop]
        return rows[halves(len(rows), self.heads)] if self.heads else rows

    def _shape(self, file: GgufFile) -> tuple[int, ...]:
        shape = file.tensors[self.name].shape
        return self.shape or (shape if self.expert is None else shape[1:])

    def _size(self, file: GgufFile) -> int:
        entry = file.tensors[self.name]
        return entry.nbytes if self.expert is None else entry.nbytes // entry.shape[0]

    def _data(self, file: GgufFile) -> Tensor:
        data_B = torch.empty(self._size(file), dtype=torch.uint8)
        data: Any = data_B.numpy()
        file.read_into(self.name, memoryview(data), (self.expert or 0) * len(data_B))
        return data_B


def halves(rows: int, heads: int) -> Tensor:
    """Where the rows of heads come from: of each head, the even ones, then the odd ones."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Gates and values of all experts as rows in turn, stored [experts, in, out] (gpt-oss); biases [experts, out]."""

    gate: Whole
    up: Whole

    def stored(self, file: GgufFile) -> Stored:
        one, other = self.gate.stored(file), self.up.stored(file)
        if one.shape != other.shape:
            return replace(one, grouped=0)
        *outer, width = one.shape
        size = one.grouped + other.grouped if one.grouped and other.grouped else 0
        return replace(one, shape=(*outer, 2 * width), grouped=size)

    def dense(self, file: GgufFile) -> Tensor:
        return torch.stack([self.gate.dense(file), self.up.dense(file)], dim=-1).flatten(-2)

    def grouped(self, file: GgufFile) -> Grouped | None:
        one, other = self.gate.grouped(file), self.up.grouped(file)
        if one is None or other is None or (one.values, one.group) != (other.values, other.group):
            return None
        pair = one, other

        def rows(pick: Callable[[Grouped], Tensor | None], axis: int) -> Tensor | None:
            parts = [part for part in map(pick, pair) if part is not None]
            return torch.stack(parts, dim=axis).flatten(axis - 1, axis) if len(parts) == 2 else None

        codes, scales = rows(lambda part: part.codes, -2), rows(lambda part: part.scales, -2)
        assert codes is not None and scales is not None
        minima, factors = rows(lambda part: part.minima, -2), rows(lambda part: part.factors, -1)
        return replace(one, codes=codes, scales=scales, minima=minima, factors=factors)


@dataclass(frozen=True, slots=True)
class KeysAndValues:
    """MLA's projection up from the latents, of each head first the keys, then the values. The file has the keys' part
    per head [heads, latents, keys], the values' [heads, values, latents]."""

    keys: Whole
    values: Whole

    def stored(self, file: GgufFile) -> Stored:
        one, other = self.keys.stored(file), self.values.stored(file)
        if len(one.shape) != 3 or len(other.shape) != 3 or one.shape[1] != other.shape[2]:
            return replace(one, grouped=0)
        heads, latents, keys = one.shape
        return replace(one, dtype=torch.float32, shape=(heads * (keys + other.shape[1]), latents), grouped=0)

    def dense(self, file: GgufFile) -> Tensor:
        keys, values = self.keys.dense(file).float(), self.values.dense(file).float()
        return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)

    def grouped(self, file: GgufFile) -> Grouped | None:
        """None: the groups of the keys' part lie along its outputs."""
        return None
