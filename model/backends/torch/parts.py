"""Attention of a layer that does not run on all rows of a step, or does not look at what came before them: an encoder's
layers, and a decoder's attention to them.

What each sequence does is a `Part`. The tiles are those of any attention over pages (see `tiles.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.backends.torch.tiles import MIN_TILE, TILE, WORKSPACE, Group, Sizes, attend
from model.batch import Pages, Part, Span
from model.devices import CPU
from model.step import MaskSpec


@dataclass(frozen=True, slots=True)
class _Queries:
    """Neighbouring rows of one part, and the positions that they may see."""

    part: int
    row: int
    rows: int
    position: int
    first: int
    end: int

    @property
    def seen(self) -> int:
        """How many positions."""
        return self.end - self.first


class PartAttend:
    """Keys and values go to their pages where there are pages and the layer keeps them; else they serve this step
    alone."""

    def __init__(self, parts: Sequence[Part], pages: Pages | None = None, device: torch.device | str = CPU) -> None:
        self._parts, self._pages, self._device = tuple(parts), pages, device
        self._groups: dict[tuple[bool, bool, Sizes], list[Group]] = {}

    def part(self, parts: Sequence[Part]) -> "PartAttend":
        """Over the same pages."""
        return PartAttend(parts, self._pages, self._device)

    def attend(self, memory: int, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor | int, spec: MaskSpec) -> Tensor:
        """Attention of the parts' queries, [T, H, V]."""
        assert isinstance(v_TGV, Tensor)
        kept = memory >= 0 and self._pages is not None
        cache_PSGC = self._kept(memory, k_TGC, v_TGV) if kept else torch.stack([k_TGC, v_TGV])
        _, kv_heads, width = k_TGC.shape
        sizes = Sizes(q_THC.shape[1], kv_heads, width, v_TGV.shape[2], cache_PSGC.element_size(), bool(spec.bias))
        out_THV = q_THC.new_empty(*q_THC.shape[:2], v_TGV.shape[2])
        for group in self._grouped(kept, spec.causal, sizes):
            out_THV[group.rows_bR] = attend(q_THC[group.rows_bR], cache_PSGC, group, spec, sizes)
        return out_THV

    def spans(self, rows: int) -> tuple[Span, ...]:
        """The rows of each part."""
        found, first = [], 0
        for part in self._parts:
            found.append(Span(first, part.queries, part.query + part.queries))
            first += part.queries
        return tuple(found)

    def states(self, memory: int, rows: int, size: int) -> Iterator[tuple[slice, Tensor, bool]]:
        """Raises TypeError: a state moves on with all tokens of a sequence."""
        raise TypeError("a layer of a part of a step keeps no states")

    def _kept(self, memory: int, k_TGC: Tensor, v_TGV: Tensor) -> Tensor:
        """The cache, with the new keys and values in it."""
        assert self._pages is not None
        cache_PSGC = self._pages.cache.layers[memory]
        if len(k_TGC):
            slots_T = self._new_slots
            cache_PSGC[0, slots_T], cache_PSGC[1, slots_T] = k_TGC, v_TGV
        return cache_PSGC

    @cached_property
    def _new_slots(self) -> Tensor:
        """Where new keys and values go: the same in every layer."""
        new = [self._slots(True, n, torch.arange(p.key, p.key + p.keys)) for n, p in enumerate(self._parts) if p.keys]
        return torch.cat(new).to(self._device)

    def _slots(self, kept: bool, number: int, position_S: Tensor) -> Tensor:
        """Where the keys and values of a part's positions lie: in the pages, or among this step's rows."""
        part = self._parts[number]
        if not kept:
            return position_S - part.key + sum(before.keys for before in self._parts[:number])
        assert self._pages is not None
        size = self._pages.cache.block_size
        return self._pages.tables_BP[part.sequence][position_S // size] * size + position_S % size

    def _grouped(self, kept: bool, causal: bool, sizes: Sizes) -> list[Group]:
        key = (kept, causal, sizes)
        if key not in self._groups:
            alike = _alike(list(self._queries(causal, sizes.rows)), sizes)
            self._groups[key] = [self._group(kept, causal, some).to(torch.device(self._device)) for some in alike]
        return self._groups[key]

    def _queries(self, causal: bool, most: int) -> Iterator[_Queries]:
        """All rows, at most so many at a time."""
        row = 0
        for number, part in enumerate(self._parts):
            for done in range(0, part.queries, most):
                rows, position = min(most, part.queries - done), part.query + done
                end = min(part.end, position + rows) if causal else part.end
                yield _Queries(number, row + done, rows, position, part.first, end)
            row += part.queries

    def _group(self, kept: bool, causal: bool, queries: Sequence[_Queries]) -> Group:
        """Queries of equally many rows. The first slot of a sequence stands for those that it has not, and they have a
        position that no query sees."""
        longest, rows = max(some.seen for some in queries), queries[0].rows
        keys, slots = [], []
        for some in queries:
            position_S = torch.arange(some.first, some.end)
            own_S = self._slots(kept, some.part, position_S)
            missing, unseen = longest - some.seen, some.position + rows if causal else -1
            keys.append(torch.cat([position_S, torch.full((missing,), unseen)]))
            slots.append(torch.cat([own_S, own_S[:1].expand(missing)]))
        offsets_R = torch.arange(rows)
        row_b, position_b = torch.tensor([(some.row, some.position) for some in queries]).unbind(1)
        return Group(row_b[:, None] + offsets_R, position_b[:, None] + offsets_R, torch.stack(keys), torch.stack(slots))


def _alike(queries: Sequence[_Queries], sizes: Sizes) -> Iterator[list[_Queries]]:
    """Groups of equally many rows. Single rows see at most twice as much as the first of their group, others as much as
    it, so that no time is lost on padding."""
    group: list[_Queries] = []
    for some in sorted(queries, key=lambda some: (some.rows, some.seen)):
        room = TILE if some.rows == 1 else WORKSPACE
        most = max(1, room // MIN_TILE // (sizes.key_bytes + some.rows * sizes.score_bytes))
        longest = group[0].seen * (2 if some.rows == 1 else 1) if group else 0
        if group and (some.rows != group[0].rows or some.seen > longest or len(group) == most):
            yield group
            group = []
        group.append(some)
    if group:
        yield group
