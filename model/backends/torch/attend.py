"""Two ways to see the past: whole sequences side by side (training, reference), and a paged cache (serving).

Both are plain torch and give the same values. They depend on blocks and slots, not on requests. A cache is one tensor
for each of `config.memory`: pages, or a state per running sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backends.torch.parts import PartAttend
from model.backends.torch.tiles import Group, Sizes, attend, groups, seen
from model.batch import Pages, Part, Span
from model.step import MaskSpec


@dataclass(frozen=True, slots=True)
class WholeAttend:
    """Causal attention inside sequences of one `length`, T = B · length rows in order. States are made on `device`."""

    length: int
    device: torch.device | str = "cpu"

    def attend(self, memory: int, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor | int, spec: MaskSpec) -> Tensor:
        """Attention within each sequence."""
        values = k_TGC[..., :v_TGV] if isinstance(v_TGV, int) else v_TGV
        q, k, v = self._by_sequence(q_THC), self._by_sequence(k_TGC), self._by_sequence(values)
        if spec.window or spec.chunk or spec.sinks_H is not None:
            position_S = torch.arange(self.length, device=q.device)
            mask = seen(position_S[:, None], position_S[None], spec)
            out = _attend(q, k, v, mask, spec)
        else:
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)

    def _by_sequence(self, rows_THC: Tensor) -> Tensor:
        return rows_THC.unflatten(0, (-1, self.length)).transpose(1, 2)

    def part(self, parts: Sequence[Part]) -> PartAttend:
        """Of sequences that all start with this step."""
        return PartAttend(parts, device=self.device)

    def spans(self, rows: int) -> tuple[Span, ...]:
        """The sequences, side by side."""
        firsts = range(0, rows, self.length)
        return tuple(Span(first, self.length, self.length) for first in firsts)

    def states(self, memory: int, rows: int, size: int) -> Iterator[tuple[slice, Tensor, bool]]:
        """A fresh state for each sequence."""
        for first in range(0, rows, self.length):
            yield slice(first, first + self.length), torch.zeros(size, device=self.device), True


class PagedAttend:
    """One step: new keys and values are written to their slots, then every query attends over its pages in tiles.

    What is read where is worked out on the CPU, from pages that are there, and copied to the device once per step.
    """

    def __init__(self, pages: Pages, device: torch.device) -> None:
        self.cache, self.pages, self._spans = pages.cache, pages, pages.spans
        self._device = device
        sequences = zip(pages.tables_BP, self._spans, strict=True)
        slots_T = torch.cat([self._new_slots(table_P, span) for table_P, span in sequences])
        self.slots_T = slots_T.to(device, non_blocking=True)
        self._snapshots: dict[int, list[tuple[int, int]]] = {}  # of a sequence: after so many rows, to which slot
        for index, after, slot in [] if pages.snapshots_N3 is None else pages.snapshots_N3.tolist():
            self._snapshots.setdefault(index, []).append((after, slot))
        self._groups: dict[tuple[int, int, Sizes], list[Group]] = {}  # by what a layer sees; most layers see the same

    def _new_slots(self, table_P: Tensor, span: Span) -> Tensor:
        position_R = torch.arange(span.context - span.rows, span.context)
        size = self.cache.block_size
        return table_P[position_R // size] * size + position_R % size

    def attend(self, memory: int, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor | int, spec: MaskSpec) -> Tensor:
        """Attention over the pages, in which this step's keys and values are put first."""
        cache_PSGC = self.cache.layers[memory]
        cache_PSGC[0, self.slots_T] = k_TGC
        if isinstance(v_TGV, Tensor):
            cache_PSGC[1, self.slots_T] = v_TGV
        width = v_TGV if isinstance(v_TGV, int) else v_TGV.shape[-1]
        _, kv_heads, key_width = k_TGC.shape
        sizes = Sizes(q_THC.shape[1], kv_heads, key_width, width, cache_PSGC.element_size())
        out_THV = q_THC.new_empty(*q_THC.shape[:2], width)
        for group in self._grouped(spec, sizes):
            out_THV[group.rows_bR] = attend(q_THC[group.rows_bR], cache_PSGC, group, spec, sizes)
        return out_THV

    def _grouped(self, spec: MaskSpec, sizes: Sizes) -> list[Group]:
        key = (spec.window, spec.chunk, sizes)
        if key not in self._groups:
            tables_BP, block_size = self.pages.tables_BP, self.cache.block_size
            made = groups(self._spans, tables_BP, block_size, spec, sizes)
            self._groups[key] = [group.to(self._device) for group in made]
        return self._groups[key]

    def part(self, parts: Sequence[Part]) -> PartAttend:
        """Over the same pages."""
        return PartAttend(parts, self.pages, self._device)

    def spans(self, rows: int) -> tuple[Span, ...]:
        """Those of the pages."""
        return self._spans

    def states(self, memory: int, rows: int, size: int) -> Iterator[tuple[slice, Tensor, bool]]:
        """Each sequence's rows, its state, written in place, and whether it starts with this step. Rows before and
        after a snapshot come one after the other."""
        assert self.pages.slots_B is not None
        states_SX = self.cache.layers[memory]
        for index, (span, slot) in enumerate(zip(self._spans, self.pages.slots_B.tolist(), strict=True)):
            begin, end, fresh = span.first, span.first + span.rows, span.context == span.rows
            for after, target in self._snapshots.get(index, ()):
                yield slice(begin, span.first + after), states_SX[slot], fresh
                states_SX[target] = states_SX[slot]
                begin, fresh = span.first + after, False
            if begin < end:
                yield slice(begin, end), states_SX[slot], fresh


def _attend(q_BHRC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, mask: Tensor, spec: MaskSpec) -> Tensor:
    """Scaled dot-product attention with grouped heads; returns [B, H, R, V].

    In float32 whatever the model's dtype: for single queries torch's bfloat16 path takes four times as long.
    """
    q, k, v = q_BHRC.float(), k_BGSC.float(), v_BGSV.float()
    grouped = q.shape[1] != k.shape[1]
    if spec.sinks_H is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale, enable_gqa=grouped)
        return out.to(q_BHRC.dtype)
    if grouped:
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-1, -2) * spec.scale
    logits = scores.masked_fill(~mask, -torch.inf)
    sinks = spec.sinks_H.float()[None, :, None, None]
    sink = sinks.expand(*logits.shape[:-1], 1)
    weight = torch.cat([logits, sink], dim=-1).softmax(-1)
    return (weight[..., :-1] @ v).to(q_BHRC.dtype)
