"""Two ways to see the past: whole sequences side by side (training, reference), and a paged cache (serving).

Both are plain torch and give the same values. They know blocks and slots, not requests. A cache is a group per layer:
pages for attention, a state per running sequence for recurrent layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention.base import Rule
from model.backends.torch.tiles import Group, Sizes, attend, groups, seen
from model.batch import Pages, Span
from model.shapes import attention as shapes

Memory = shapes.Pages | shapes.State


@dataclass(frozen=True, slots=True)
class WholeAttend:
    """Causal attention inside sequences of one `length`, T = B · length rows in order."""

    length: int

    def __call__(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor | int, rule: Rule) -> Tensor:
        values = k_TGC[..., :v_TGV] if isinstance(v_TGV, int) else v_TGV
        q, k, v = (t.unflatten(0, (-1, self.length)).transpose(1, 2) for t in (q_THC, k_TGC, values))
        if rule.window or rule.chunk or rule.sinks_H is not None:
            position_S = torch.arange(self.length, device=q.device)
            out = _attend(q, k, v, seen(position_S[:, None], position_S[None], rule), rule)
        else:
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=rule.scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)

    def states(self, layer: int, rows: int, size: int) -> Iterator[tuple[slice, Tensor, bool]]:
        """A fresh state for each sequence."""
        for first in range(0, rows, self.length):
            yield slice(first, first + self.length), torch.zeros(size), True


class PagedCache:
    """`blocks` blocks of `block_size` tokens, and `slots` states: one tensor per layer, by its kind of memory.

    Pages: [2, tokens, G, C] for keys and values, or [1, tokens, G, C] where values are part of the keys. States:
    float32 [slots, size].
    """

    def __init__(
        self, memory: Sequence[Memory], blocks: int, block_size: int, dtype: torch.dtype, slots: int = 0
    ) -> None:
        self.block_size = block_size
        self.layers = [
            torch.zeros(slots, kind.size)
            if isinstance(kind, shapes.State)
            else torch.zeros(1 + kind.values, blocks * block_size, kind.heads, kind.key_width, dtype=dtype)
            for kind in memory
        ]

    def attend(self, pages: Pages) -> "PagedAttend":
        """Attention over this cache for one step."""
        return PagedAttend(self, pages)


def bytes_per_block(memory: Sequence[Memory], block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    pages = [kind for kind in memory if isinstance(kind, shapes.Pages)]
    return sum((1 + kind.values) * kind.heads * kind.key_width for kind in pages) * block_size * dtype.itemsize


def bytes_per_sequence(memory: Sequence[Memory]) -> int:
    """Memory of one running sequence's states over all layers."""
    return sum(kind.size for kind in memory if isinstance(kind, shapes.State)) * torch.float32.itemsize


class PagedAttend:
    """One step: new keys and values are written to their slots, then every query attends over its pages in tiles."""

    def __init__(self, cache: PagedCache, pages: Pages) -> None:
        self.cache, self.pages, self.spans = cache, pages, pages.spans
        self.slots_T = torch.cat(
            [self._new_slots(table_P, s) for table_P, s in zip(pages.tables_BP, self.spans, strict=True)]
        )
        self._groups: dict[tuple[int, int, Sizes], list[Group]] = {}  # by what a layer sees; most layers see the same

    def _new_slots(self, table_P: Tensor, span: Span) -> Tensor:
        position_R = torch.arange(span.context - span.rows, span.context)
        size = self.cache.block_size
        return table_P[position_R // size] * size + position_R % size

    def __call__(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGV: Tensor | int, rule: Rule) -> Tensor:
        cache_PSGC = self.cache.layers[layer]
        cache_PSGC[0, self.slots_T] = k_TGC
        if isinstance(v_TGV, Tensor):
            cache_PSGC[1, self.slots_T] = v_TGV
        width = v_TGV if isinstance(v_TGV, int) else v_TGV.shape[-1]
        sizes = Sizes(q_THC.shape[1], k_TGC.shape[1], k_TGC.shape[2], width, cache_PSGC.element_size())
        out_THV = q_THC.new_empty(*q_THC.shape[:2], width)
        for group in self._grouped(rule, sizes):
            out_THV[group.rows_bR] = attend(q_THC[group.rows_bR], cache_PSGC, group, rule, sizes)
        return out_THV

    def _grouped(self, rule: Rule, sizes: Sizes) -> list[Group]:
        key = (rule.window, rule.chunk, sizes)
        if key not in self._groups:
            self._groups[key] = groups(self.spans, self.pages.tables_BP, self.cache.block_size, rule, sizes)
        return self._groups[key]

    def states(self, layer: int, rows: int, size: int) -> Iterator[tuple[slice, Tensor, bool]]:
        """Each sequence's rows, its state, written in place, and whether it starts with this step."""
        assert self.pages.slots_B is not None
        for span, slot in zip(self.spans, self.pages.slots_B.tolist(), strict=True):
            yield slice(span.first, span.first + span.rows), self.cache.layers[layer][slot], span.context == span.rows


def _attend(q_BHRC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """Scaled dot-product attention with grouped heads; returns [B, H, R, V].

    In float32 whatever the model's dtype: for single queries torch's bfloat16 path takes four times as long.
    """
    q, k, v = q_BHRC.float(), k_BGSC.float(), v_BGSV.float()
    grouped = q.shape[1] != k.shape[1]
    if rule.sinks_H is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scale, enable_gqa=grouped)
        return out.to(q_BHRC.dtype)
    if grouped:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    logits = (q @ k.transpose(-1, -2) * rule.scale).masked_fill(~mask, -torch.inf)
    sink = rule.sinks_H.float()[None, :, None, None].expand(*logits.shape[:-1], 1)
    weight = torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1]
    return (weight @ v).to(q_BHRC.dtype)
