"""How a tensor of Hugging Face's layout is made of those of a GGUF file: a whole one, an expert of one, or two joined.

It does not depend on names.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from model.errors import CheckpointError, shown
from model.grouped import Grouped
from weights.files import Stored
from weights.forms import Form, common
from weights.gguf.blocks import dense, dtype_of, form_of, grouped
from weights.gguf.reader import GgufFile
from weights.groups import joined
from weights.rules import TensorPart


class Part(Protocol):
    """One tensor as a family's rules want it."""

    def stored(self, file: GgufFile) -> Stored:
        """Where and as what it is stored.

        Raises:
            CheckpointError: the tensors that it is made of do not fit each other.
        """
        ...

    def dense(self, file: GgufFile) -> Tensor:
        """The values, in the dtype and the shape of `stored`."""
        ...

    def grouped(self, file: GgufFile) -> Grouped | None:
        """The values with outputs and inputs as the last axes, also where `stored` has them transposed, and so says
        `turned`."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor of the file.

    Attributes:
        expert: of a tensor with all experts, the one that is meant.
        heads: of queries or keys whose heads have pairs of rotary rows as neighbours; moved back to halves.
        rows: those of queries, keys and values in one that are meant; the tensor has them.
        transposed: the rules want [in, out].
        shape: the one that the rules want, where the file leaves out an axis of one; a tensor of another size keeps
            its own.
        change: what the converter did to the values, undone.
    """

    name: str
    expert: int | None = None
    heads: int = 0
    rows: range | None = None
    transposed: bool = False
    shape: tuple[int, ...] | None = None
    change: Callable[[Tensor], Tensor] | None = None

    def stored(self, file: GgufFile) -> Stored:
        entry = file.tensors[self.name]
        shape = self._shape(file)
        if self.rows is not None:
            shape = (len(self.rows), *shape[1:])
        form = None if self.shape or self.change else form_of(entry.type, shape)
        if self.transposed and len(shape) > 1:
            shape = (*shape[:-2], shape[-1], shape[-2])
        start = entry.start + (self.expert or 0) * self._size(file)
        return Stored(file.paths[entry.part].name, start, dtype_of(entry.type), shape, form, self.transposed)

    def dense(self, file: GgufFile) -> Tensor:
        values = dense(file.tensors[self.name].type, self._data(file), self._shape(file))
        order = self._order(file)
        if order is not None:
            values = values[order]
        if self.change is not None:
            values = self.change(values)
        return values.transpose(-1, -2) if self.transposed else values

    def grouped(self, file: GgufFile) -> Grouped | None:
        if self.shape or self.change:
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
        if self.shape is not None and prod(self.shape) == prod(shape):
            return self.shape
        return shape if self.expert is None else shape[1:]

    def _size(self, file: GgufFile) -> int:
        entry = file.tensors[self.name]
        return entry.nbytes if self.expert is None else entry.nbytes // entry.shape[0]

    def _data(self, file: GgufFile) -> Tensor:
        data_B = torch.empty(self._size(file), dtype=torch.uint8)
        data: Any = data_B.numpy()
        file.read_into(self.name, memoryview(data), (self.expert or 0) * len(data_B))
        return data_B


def _unequal(file: GgufFile, one: Whole, other: Whole) -> NoReturn:
    names = (one.name, other.name)
    said = " and ".join(f"{shown(name)} has shape {file.tensors[name].shape}" for name in names)
    raise CheckpointError(f"{file.paths[0].name}: tensors that become one do not fit each other: {said}")


def halves(rows: int, heads: int) -> Tensor:
    """Where the rows of heads come from: of each head, the even ones, then the odd ones."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


@dataclass(frozen=True, slots=True)
class GateAndUp:
    """Gates and values of all experts in one, stored [experts, in, out]: one after the other, or output by output in
    turn (gpt-oss, whose biases [experts, out] too)."""

    gate: Whole
    up: Whole
    interleaved: bool

    def stored(self, file: GgufFile) -> Stored:
        one, other = self.gate.stored(file), self.up.stored(file)
        if one.shape != other.shape:
            _unequal(file, self.gate, self.up)
        *outer, width = one.shape
        form = _form(one, other) if len(outer) == 2 else None
        return replace(one, dtype=_either(one, other), shape=(*outer, 2 * width), form=form)

    def dense(self, file: GgufFile) -> Tensor:
        gate, up = self.gate.dense(file), self.up.dense(file)
        if self.interleaved:
            return torch.stack([gate, up], dim=-1).flatten(-2)
        return torch.cat([gate, up], dim=-1)

    def grouped(self, file: GgufFile) -> Grouped | None:
        gate, up = self.gate.grouped(file), self.up.grouped(file)
        if gate is None or up is None or len(gate.shape) != 3:
            return None
        experts, width, inner = gate.shape
        first, second = slice(0, width), slice(width, None)
        if self.interleaved:
            first, second = slice(0, None, 2), slice(1, None, 2)
        every = slice(None)
        parts = [(TensorPart("", (every, first)), gate), (TensorPart("", (every, second)), up)]
        return joined(parts, torch.Size([experts, 2 * width, inner]))


def _either(one: Stored, other: Stored) -> torch.dtype:
    """What holds the values of both."""
    return one.dtype if one.dtype == other.dtype else torch.float32


def _form(one: Stored, other: Stored) -> Form | None:
    """In which both are kept."""
    return None if one.form is None or other.form is None else common([one.form, other.form])


@dataclass(frozen=True, slots=True, eq=False)
class Reordered:
    """Two matrices below each other, and the rows in another order; `order` has as many as both together."""

    first: Whole
    second: Whole
    order: Tensor

    def stored(self, file: GgufFile) -> Stored:
        one, other = self.first.stored(file), self.second.stored(file)
        if one.shape[1:] != other.shape[1:]:
            _unequal(file, self.first, self.second)
        shape = (len(self.order), *one.shape[1:])
        return replace(one, dtype=_either(one, other), shape=shape, form=_form(one, other))

    def dense(self, file: GgufFile) -> Tensor:
        return torch.cat([self.first.dense(file), self.second.dense(file)])[self.order]

    def grouped(self, file: GgufFile) -> Grouped | None:
        one, other = self.first.grouped(file), self.second.grouped(file)
        if one is None or other is None:
            return None
        height, inner = one.shape
        parts = [(TensorPart("", (slice(0, height),)), one), (TensorPart("", (slice(height, None),)), other)]
        whole = joined(parts, torch.Size([len(self.order), inner]))
        return None if whole is None else whole.rows(self.order)


@dataclass(frozen=True, slots=True)
class KeysAndValues:
    """MLA's projection up from the latents, of each head first the keys, then the values. The file has the keys' part
    per head [heads, latents, keys], the values' [heads, values, latents]."""

    keys: Whole
    values: Whole

    def stored(self, file: GgufFile) -> Stored:
        one, other = self.keys.stored(file), self.values.stored(file)
        if len(one.shape) != 3 or len(other.shape) != 3 or one.shape[:2] != (other.shape[0], other.shape[2]):
            _unequal(file, self.keys, self.values)
        heads, latents, keys = one.shape
        return replace(one, dtype=torch.float32, shape=(heads * (keys + other.shape[1]), latents), form=None)

    def dense(self, file: GgufFile) -> Tensor:
        keys, values = self.keys.dense(file).float(), self.values.dense(file).float()
        return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)

    def grouped(self, file: GgufFile) -> Grouped | None:
        """None: the groups of the keys' part lie along its outputs."""
        return None
