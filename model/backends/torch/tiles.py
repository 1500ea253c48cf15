"""Attention over a paged cache in tiles of keys with a running softmax (Milakov & Gimelshein 2018; FlashAttention, Dao
et al. 2022, algorithm 1), in plain torch.

Work is the sum of what the queries see, give or take a factor of two, and memory is bounded by WORKSPACE, however long
a context is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batch import Span
from model.step import MaskSpec

WORKSPACE = 64 << 20  # bytes that attention takes at the most beside its output
TILE = 2 << 20  # bytes of one tile: keys and values in float32, scores and weights; what is larger leaves the caches
MIN_TILE = 64  # keys; a group of queries is made so small that this many fit
LOWEST = -1e30  # below every score, and finite: the difference of two of them is 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one layer: heads H, kv heads G, columns C of a key and V of a value, bytes of an element of the cache."""

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    element: int
    biased: bool = False  # scores get a bias of their distance

    @property
    def key_bytes(self) -> int:
        """What one key and its value take in a tile, as read and in float32."""
        return self.kv_heads * (self.key_width + self.value_width) * (self.element + 4)

    @property
    def score_bytes(self) -> int:
        """What one query takes per key of a tile: scores and weights of all heads, the mask, and a bias with its
        distance."""
        return self.heads * 9 + self.biased * (self.heads * 4 + 8)

    @property
    def rows(self) -> int:
        """How many queries of one sequence a group may have."""
        return max(1, (WORKSPACE // MIN_TILE - self.key_bytes) // self.score_bytes)

    def tile(self, sequences: int, rows: int) -> int:
        """How many keys a tile has for so many sequences with so many queries each."""
        return max(MIN_TILE, TILE // (sequences * (self.key_bytes + rows * self.score_bytes)))


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences with equally many queries, R each, whose visible contexts are about equally long, S at the most.

    Where one is shorter, its first slot stands for what is missing: masking does not hide a NaN that another sequence
    left in a slot.
    """

    rows_bR: Tensor  # rows of the step
    queries_bR: Tensor  # their positions
    keys_bS: Tensor  # positions of the keys; those beyond a sequence's context are seen by none of its queries
    slots_bS: Tensor  # where the keys lie in the cache

    def to(self, device: torch.device) -> "Group":
        """The same on a device, which is not waited for."""
        parts = (self.rows_bR, self.queries_bR, self.keys_bS, self.slots_bS)
        return Group(*(part.to(device, non_blocking=True) for part in parts))


def first_seen(position: int, spec: MaskSpec) -> int:
    """The first position that a query at `position` sees."""
    first = max(0, position - spec.window + 1) if spec.window else 0
    return max(first, position // spec.chunk * spec.chunk) if spec.chunk else first


def seen(query: Tensor, key: Tensor, spec: MaskSpec) -> Tensor:
    """Whether the token at position `query` sees the one at `key`; both broadcast. A negative key is none."""
    mask = key <= query if spec.causal else (key >= 0) & (query >= 0)
    if spec.window:
        mask = mask & (key > query - spec.window)
    if spec.chunk:
        mask = mask & (key // spec.chunk == query // spec.chunk)
    return mask


def groups(spans: Sequence[Span], tables_BP: Tensor, block_size: int, spec: MaskSpec, sizes: Sizes) -> list[Group]:
    """The queries of a step, cut so that a tile of each group fits WORKSPACE and padding at most doubles the work."""
    single_spans = [(index, span) for index, span in enumerate(spans) if span.rows == 1]
    singles = [(index, span.first, span.context - 1) for index, span in single_spans]
    made = [_group(part, 1, tables_BP, block_size, spec) for part in _alike(singles, spec, sizes)]
    for index, span in enumerate(spans):
        for first in range(0, span.rows if span.rows > 1 else 0, sizes.rows):
            rows = min(sizes.rows, span.rows - first)
            position = span.context - span.rows + first
            part = [(index, span.first + first, position)]
            made.append(_group(part, rows, tables_BP, block_size, spec))
    return made


Query = tuple[int, int, int]  # a sequence, the first of its rows in the step, and that row's position


def _alike(singles: list[Query], spec: MaskSpec, sizes: Sizes) -> Iterable[list[Query]]:
    """Single queries by the length of what they see: within a part the longest is at most twice the shortest."""
    most = max(1, TILE // MIN_TILE // (sizes.key_bytes + sizes.score_bytes))
    part: list[Query] = []
    shortest = 0
    for length, query in sorted(
        (position + 1 - first_seen(position, spec), (i, r, position)) for i, r, position in singles
    ):
        if part and (length > 2 * shortest or len(part) == most):
            yield part
            part = []
        shortest = shortest if part else length
        part.append(query)
    if part:
        yield part


def _group(part: list[Query], rows: int, tables_BP: Tensor, block_size: int, spec: MaskSpec) -> Group:
    sequence_b, row_b, position_b = torch.tensor(part).unbind(1)
    first_b1 = torch.tensor([[first_seen(position, spec)] for _, _, position in part])
    last_b1 = position_b[:, None] + rows - 1
    keys_bS = first_b1 + torch.arange(int((last_b1 - first_b1).max()) + 1)
    known_bS = torch.where(keys_bS <= last_b1, keys_bS, first_b1)
    blocks_bS = tables_BP[sequence_b].gather(1, known_bS // block_size)
    slots_bS = blocks_bS * block_size + known_bS % block_size
    offsets_R = torch.arange(rows)
    rows_bR = row_b[:, None] + offsets_R
    queries_bR = position_b[:, None] + offsets_R
    return Group(rows_bR, queries_bR, keys_bS, slots_bS)


def attend(q_bRHC: Tensor, cache_PSGC: Tensor, group: Group, spec: MaskSpec, sizes: Sizes) -> Tensor:
    """Scaled dot-product attention of a group's queries, in float32 whatever the cache's dtype; returns [b, R, H, V].

    Sinks are where the running softmax begins: a score of their own that adds nothing.
    """
    sequences, rows = group.rows_bR.shape
    shared = sizes.heads // sizes.kv_heads  # queries of one kv head
    if rows > 1 and _fused(group, spec, sizes):
        return _at_once(q_bRHC, cache_PSGC, group, spec, sizes)
    q_bGNC = _by_kv_head(q_bRHC.float() * spec.scale, sizes.kv_heads)
    shape = (sequences, sizes.kv_heads, rows * shared)
    top_bGN1, total_bGN1 = _start(spec, shape, rows, sizes, q_bRHC.device)
    out_bGNV = torch.zeros(*shape, sizes.value_width, device=q_bRHC.device)
    queries_bR1 = group.queries_bR[:, :, None]
    length, step = group.keys_bS.shape[1], sizes.tile(sequences, rows)
    for first in range(0, length, step):
        keys = slice(first, min(first + step, length))
        k_bGSC, v_bGSV = _read(cache_PSGC, group.slots_bS[:, keys], sizes.value_width)
        mask_bRS = seen(queries_bR1, group.keys_bS[:, None, keys], spec)
        score_bGNS = q_bGNC @ k_bGSC.transpose(-1, -2)
        score_bGRKS = score_bGNS.unflatten(2, (rows, shared))
        if spec.bias is not None:
            bias_HbRS = spec.bias.at(queries_bR1, group.keys_bS[:, None, keys])
            score_bGRKS += bias_HbRS.unflatten(0, (sizes.kv_heads, shared)).permute(2, 0, 3, 1, 4)
        score_bGRKS.masked_fill_(~mask_bRS[:, None, :, None], -torch.inf)
        higher_bGN1 = torch.maximum(top_bGN1, score_bGNS.amax(-1, keepdim=True))
        weight_bGNS, fade_bGN1 = score_bGNS.sub_(higher_bGN1).exp_(), (top_bGN1 - higher_bGN1).exp_()
        total_bGN1 = total_bGN1 * fade_bGN1 + weight_bGNS.sum(-1, keepdim=True)
        out_bGNV.mul_(fade_bGN1).add_(weight_bGNS @ v_bGSV)
        top_bGN1 = higher_bGN1
    out_bGRKV = (out_bGNV / total_bGN1).unflatten(2, (rows, shared))
    return out_bGRKV.transpose(1, 2).flatten(2, 3).to(q_bRHC.dtype)


def _fused(group: Group, spec: MaskSpec, sizes: Sizes) -> bool:
    """Whether torch's own kernel, a third faster for many queries, keeps to WORKSPACE: it knows no sinks, and writes
    whole score matrices where keys and values differ in width. A bias is such a matrix too."""
    plain = spec.sinks_H is None and sizes.key_width == sizes.value_width
    if spec.bias is not None and 8 * sizes.heads * group.rows_bR.shape[1] * group.keys_bS.numel() > WORKSPACE:
        return False
    return plain and group.slots_bS.numel() * sizes.key_bytes <= WORKSPACE


def _at_once(q_bRHC: Tensor, cache_PSGC: Tensor, group: Group, spec: MaskSpec, sizes: Sizes) -> Tensor:
    k_bGSC, v_bGSV = _read(cache_PSGC, group.slots_bS, sizes.value_width)
    mask_bRS = seen(group.queries_bR[:, :, None], group.keys_bS[:, None], spec)
    mask_bHRS = mask_bRS[:, None]
    if spec.bias is not None:
        bias_HbRS = spec.bias.at(group.queries_bR[:, :, None], group.keys_bS[:, None])
        mask_bHRS = bias_HbRS.transpose(0, 1).masked_fill(~mask_bHRS, -torch.inf)
    q_bHRC = q_bRHC.transpose(1, 2).float()
    grouped = sizes.heads != sizes.kv_heads
    out_bHRV = F.scaled_dot_product_attention(q_bHRC, k_bGSC, v_bGSV, mask_bHRS, scale=spec.scale, enable_gqa=grouped)
    return out_bHRV.transpose(1, 2).to(q_bRHC.dtype)


def _by_kv_head(q_bRHC: Tensor, kv_heads: int) -> Tensor:
    """Queries beside the keys that they share: [b, G, N, C], N = R · H / G."""
    return q_bRHC.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)


def _start(
    spec: MaskSpec, shape: tuple[int, int, int], rows: int, sizes: Sizes, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The running maximum and sum before the first key."""
    if spec.sinks_H is None:
        return torch.full((*shape, 1), LOWEST, device=device), torch.zeros(*shape, 1, device=device)
    sinks_GK = spec.sinks_H.float().unflatten(0, (sizes.kv_heads, -1))
    sinks_bGNK = sinks_GK[None, :, None].expand(shape[0], -1, rows, -1)
    return sinks_bGNK.flatten(2).unsqueeze(-1), torch.ones(*shape, 1, device=device)


def _read(cache_PSGC: Tensor, slots_bS: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The slots' keys [b, G, S, C] and values in float32. Looked up as whole rows: plain indexing takes many times as
    long."""
    k_bGSC, *v = (_rows_of(part_SGC, slots_bS) for part_SGC in cache_PSGC)
    return k_bGSC, v[0] if v else k_bGSC[..., :width]


def _rows_of(part_SGC: Tensor, slots_bS: Tensor) -> Tensor:
    rows_bSX = F.embedding(slots_bS, part_SGC.flatten(1))
    return rows_bSX.unflatten(-1, part_SGC.shape[1:]).transpose(1, 2).float()
