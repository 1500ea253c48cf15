"""Two ways to attend: over whole sequences side by side (training, reference), and over a paged cache (serving).

Both are plain torch and give the same values. They know blocks and slots, not requests.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batch import Pages, Span


@dataclass(frozen=True, slots=True)
class WholeAttend:
    """Causal attention inside sequences of one `length`, T = B · length rows in order."""

    length: int

    def __call__(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        q, k, v = (t.unflatten(0, (-1, self.length)).transpose(1, 2) for t in (q_THC, k_TGC, v_TGC))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(0, 1)


class PagedCache:
    """Keys and values in `blocks` blocks of `block_size` tokens: one [2, slots, G, C] tensor per layer."""

    def __init__(
        self, layers: int, blocks: int, block_size: int, kv_heads: int, head_width: int, dtype: torch.dtype
    ) -> None:
        self.block_size = block_size
        shape = (2, blocks * block_size, kv_heads, head_width)
        self.layers = [torch.zeros(shape, dtype=dtype) for _ in range(layers)]

    def attend(self, pages: Pages) -> "PagedAttend":
        """Attention over this cache for one step."""
        return PagedAttend(self, pages)

    @staticmethod
    def bytes_per_block(layers: int, block_size: int, kv_heads: int, head_width: int, dtype: torch.dtype) -> int:
        """Memory of one block over all layers."""
        return layers * 2 * block_size * kv_heads * head_width * dtype.itemsize


class PagedAttend:
    """Attention of one step: new keys and values are written to their slots, then each span attends over its pages."""

    def __init__(self, cache: PagedCache, pages: Pages) -> None:
        self.cache, self.pages, self.spans = cache, pages, pages.spans
        offset = torch.arange(cache.block_size)
        self.slots_BS = (pages.tables_BP[:, :, None] * cache.block_size + offset).flatten(1)
        self.slots_T = torch.cat(
            [self.slots_BS[i, span.context - span.rows : span.context] for i, span in enumerate(self.spans)]
        )
        self.singles = [i for i, span in enumerate(self.spans) if span.rows == 1]
        self.chunks = [i for i, span in enumerate(self.spans) if span.rows > 1]
        if self.singles:
            self._prepare_singles()

    def _prepare_singles(self) -> None:
        """Spans of one row attend together, padded to the longest context among them.

        The padding is a sequence's own first slot: masking does not hide a NaN that a stranger left in another.
        """
        spans = [self.spans[i] for i in self.singles]
        longest = max(span.context for span in spans)
        self.rows_b = torch.tensor([span.first for span in spans])
        context_b1 = torch.tensor([[span.context] for span in spans])
        mask_bS = torch.arange(longest) < context_b1
        slots_bS = self.slots_BS[self.singles, :longest]
        self.slots_bS = torch.where(mask_bS, slots_bS, slots_bS[:, :1])
        self.mask_b11S = mask_bS[:, None, None]

    def __call__(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        cache_2SGC = self.cache.layers[layer]
        cache_2SGC[0, self.slots_T], cache_2SGC[1, self.slots_T] = k_TGC, v_TGC
        out_THC = torch.empty_like(q_THC)
        if self.singles:
            q_bH1C = q_THC[self.rows_b].unsqueeze(2)
            k_bSGC, v_bSGC = (_read(cache_SGC, self.slots_bS) for cache_SGC in cache_2SGC)
            out_THC[self.rows_b] = _attend(q_bH1C, k_bSGC, v_bSGC, self.mask_b11S).squeeze(2)
        for i in self.chunks:
            span = self.spans[i]
            rows = slice(span.first, span.first + span.rows)
            k_SGC, v_SGC = (_read(cache_SGC, self.slots_BS[i, : span.context]) for cache_SGC in cache_2SGC)
            out_THC[rows] = self._chunk(q_THC[rows], k_SGC, v_SGC, span)
        return out_THC

    def _chunk(self, q_RHC: Tensor, k_SGC: Tensor, v_SGC: Tensor, span: Span) -> Tensor:
        """Several new tokens of one sequence: row r sees the context up to and including itself."""
        seen_R = torch.arange(span.context - span.rows, span.context)
        mask_RS = torch.arange(span.context)[None] <= seen_R[:, None]
        q_1HRC = q_RHC.transpose(0, 1)[None]
        return _attend(q_1HRC, k_SGC[None], v_SGC[None], mask_RS)[0].transpose(0, 1)


def _read(cache_SGC: Tensor, slots: Tensor) -> Tensor:
    """The slots' keys or values, [..., G, C]. Looked up as whole rows: plain indexing takes many times as long."""
    return F.embedding(slots, cache_SGC.flatten(1)).unflatten(-1, cache_SGC.shape[1:])


def _attend(q_BHRC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot-product attention with grouped heads; returns [B, H, R, C].

    In float32 whatever the model's dtype: for single queries torch's bfloat16 path takes four times as long.
    """
    k, v = k_BSGC.float().transpose(1, 2), v_BSGC.float().transpose(1, 2)
    grouped = q_BHRC.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q_BHRC.float(), k, v, attn_mask=mask, enable_gqa=grouped).to(q_BHRC.dtype)
