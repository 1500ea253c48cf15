"""What the native ops of attention compute, in plain torch and float64; see `reference`."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention.rope import rotate
from model.backends.cpu.kernels.pack import Kind
from model.backends.cpu.kernels.reference import Norm, Weight, encode
from model.shapes.rope import Rope

ROUND, PART = 128, 1024  # keys after which the running maximum of csrc/attender.h is renewed, and is reset


class Slots:
    """A paged cache without tiles: keys and values [slots, G, C], rounded to the cache's dtype. With `values`, the
    first so many elements of the keys are the values. In int8 each key and value has a scale."""

    def __init__(
        self, slots: int, kv_heads: int, head_width: int, block_size: int, dtype: torch.dtype, values: int = 0
    ) -> None:
        self.block_size = block_size
        self.kind: Kind = "bfloat16" if dtype == torch.bfloat16 else "float"  # of what is multiplied
        self.kept: Kind = "int8" if dtype == torch.int8 else self.kind
        shape = (2, slots, kv_heads, head_width)
        self.k_SGC, self.v_SGC = torch.full(shape, torch.nan, dtype=torch.float64)
        if values:
            self.v_SGC = self.k_SGC[..., :values]

    def slots(self, table_P: Tensor, first: int, last: int) -> Tensor:
        """Where positions [first, last) of a sequence live."""
        at = torch.arange(first, last)
        return table_P[at // self.block_size] * self.block_size + at % self.block_size

    def write(self, k_TGC: Tensor, v_TGC: Tensor | None, spans_B3: Tensor, tables_BP: Tensor) -> None:
        """New keys and values of every span."""
        for (first, rows, context), table_P in zip(spans_B3.tolist(), tables_BP, strict=True):
            slots = self.slots(table_P, context - rows, context)
            new = slice(first, first + rows)
            self.k_SGC[slots] = encode(k_TGC[new], self.kept)
            if v_TGC is not None:
                self.v_SGC[slots] = encode(v_TGC[new], self.kept)


@dataclass(frozen=True, slots=True)
class Attention:
    """`window` and `chunk` 0: everything before; `softcap` 0: none; `sinks` [H] are scores without values."""

    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None

    def scores(self, q_RHC: Tensor, k_SHC: Tensor) -> Tensor:
        """[R, H, S] of the last R positions; what a query does not see is -inf."""
        scores_RHS = torch.einsum("rhc,shc->rhs", q_RHC, k_SHC) * self.scale
        if self.softcap:
            scores_RHS = (scores_RHS / self.softcap).tanh() * self.softcap
        rows, keys = len(q_RHC), len(k_SHC)
        query_R, key_S = torch.arange(keys - rows, keys), torch.arange(keys)
        behind_RS = query_R[:, None] - key_S
        seen_RS = (behind_RS >= 0) & (behind_RS < (self.window or keys))
        if self.chunk:
            seen_RS &= query_R[:, None] // self.chunk == key_S // self.chunk
        return scores_RHS.masked_fill(~seen_RS[:, None], -torch.inf)

    def one(self, q_RHC: Tensor, k_SGC: Tensor, v_SGC: Tensor, rounds: bool) -> Tensor:
        """The last R positions of one sequence over all of it, [R, H, C]. `rounds`: probabilities go to bfloat16."""
        per = q_RHC.shape[1] // k_SGC.shape[1]
        k_SHC, v_SHC = k_SGC.repeat_interleave(per, 1), v_SGC.repeat_interleave(per, 1)
        scores_RHS = self.scores(q_RHC, k_SHC)
        most_RH1 = scores_RHS.amax(-1, keepdim=True)
        total_RH1 = (scores_RHS - most_RH1).exp().sum(-1, keepdim=True)
        if self.sinks is not None:
            total_RH1 = total_RH1 + (self.sinks.double()[:, None] - most_RH1).exp()
        base_RHS = running_maximum(scores_RHS) if rounds else most_RH1
        p_RHS = (scores_RHS - base_RHS).exp().nan_to_num(0.0)
        p_RHS = p_RHS.float().bfloat16().double() if rounds else p_RHS
        return torch.einsum("rhs,shc->rhc", p_RHS * (base_RHS - most_RH1).exp(), v_SHC) / total_RH1


def running_maximum(scores_RHS: Tensor) -> Tensor:
    """Of each key, the largest score of its part up to the end of its round: what its probability is relative to."""
    keys = scores_RHS.shape[-1]
    padded = F.pad(scores_RHS, (0, -keys % PART), value=-torch.inf)
    rounds = padded.unflatten(-1, (-1, PART // ROUND, ROUND))
    most = rounds.amax(-1).cummax(-1).values
    return most[..., None].expand(rounds.shape).flatten(-3)[..., :keys]


def attend(q_THC: Tensor, cache: Slots, spans_B3: Tensor, tables_BP: Tensor, rules: Attention) -> Tensor:
    """Every new token over its sequence up to itself, [T, H, V]."""
    out_THV = torch.zeros(*q_THC.shape[:2], cache.v_SGC.shape[-1], dtype=torch.float64)
    for (first, rows, context), table_P in zip(spans_B3.tolist(), tables_BP, strict=True):
        slots, new = cache.slots(table_P, 0, context), slice(first, first + rows)
        q_RHC = encode(q_THC[new], cache.kind)
        out_THV[new] = rules.one(q_RHC, cache.k_SGC[slots], cache.v_SGC[slots], cache.kind != "float")
    return out_THV


def turn(x_THC: Tensor, rotary_P2w: Tensor | None, positions_T: Tensor) -> Tensor:
    """The first 2 w elements of each head turned to their positions; all stay where there is no table."""
    if rotary_P2w is None:
        return x_THC
    cos_TW, sin_TW = (half.repeat(1, 2) for half in rotary_P2w[positions_T].unbind(1))
    return rotate(x_THC, (cos_TW[:, None], sin_TW[:, None]), Rope(cos_TW.shape[-1]))


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """One layer's attention: what `attention_block` is given beside rows and cache. `clip` 0: none.

    `norm_after`: queries and keys are normed when they have been turned. `gated`: `qkv` gives gates, behind the values.
    """

    norm: Norm
    qkv: Weight
    out: Weight
    heads: int
    rules: Attention
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_per_head: bool = False
    clip: float = 0.0
    rotary: Tensor | None = None  # [positions, 2, W / 2]
    norm_after: bool = False
    query_scale: Tensor | None = None  # [positions]
    gated: bool = False
    residual_scale: float = 1.0

    def normed(self, x_THC: Tensor, weight: Tensor | None) -> Tensor:
        """[T, heads, C], normed over all heads at once or over each."""
        norm = Norm(weight, None, self.norm.eps)
        return norm(x_THC) if self.norm_per_head else norm(x_THC.flatten(1)).view(x_THC.shape)

    def heads_of(self, x_THC: Tensor, weight: Tensor | None, positions_T: Tensor) -> Tensor:
        """Queries or keys as they meet: normed, clipped, turned."""
        if not self.norm_after:
            x_THC = self.normed(x_THC, weight)
        if self.clip:
            x_THC = x_THC.clamp(-self.clip, self.clip)
        x_THC = turn(x_THC, self.rotary, positions_T)
        return self.normed(x_THC, weight) if self.norm_after else x_THC


def attention_block(x_TD: Tensor, cache: Slots, spans_B3: Tensor, tables_BP: Tensor, block: AttentionBlock) -> Tensor:
    """x + residual_scale · attention(norm(x)); new keys and values are written to the cache."""
    kv_heads, head = cache.k_SGC.shape[1:]
    flat_TX = block.qkv(block.norm(x_TD)).float()
    numbers = (block.heads, kv_heads, kv_heads, block.heads if block.gated else 0)
    q, k, v, gate = flat_TX.unflatten(-1, (-1, head)).split(numbers, dim=1)
    positions = [torch.arange(context - rows, context) for _, rows, context in spans_B3.tolist()]
    positions_T = torch.cat(positions)
    q, k = block.heads_of(q, block.q_norm, positions_T), block.heads_of(k, block.k_norm, positions_T)
    if block.query_scale is not None:
        q = q * block.query_scale[positions_T, None, None]
    cache.write(k, v.clamp(-block.clip, block.clip) if block.clip else v, spans_B3, tables_BP)
    out_THC = attend(q, cache, spans_B3, tables_BP, block.rules)
    if block.gated:
        out_THC = out_THC * gate.double().sigmoid()
    return x_TD + block.residual_scale * block.out(out_THC.flatten(1))
