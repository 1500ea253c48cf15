"""Sequences whose rows come in any chunks over a paged cache, for the ops that attend; and what must come out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.backends.cpu.attention import Tables
from model.backends.cpu.cache import SCALE_BYTES
from model.backends.cpu.kernels import reference_attention
from model.backends.cpu.kernels.attention_params import AttentionParams, MaskParams
from model.backends.cpu.kernels.pack import Kind, Packed, pack
from model.backends.cpu.kernels.reference import Weight
from model.backends.cpu.kernels.reference_attention import Attention, AttentionBlock, Slots
from model.shapes import attention as shapes
from model.shapes.decoder import DecoderConfig
from tests.model.backends.cpu.kernels.cases import Make, norm_params, ops

Step = list[tuple[int, int, int]]  # of each sequence in the step: its number, and the positions from and until


class Layout:
    """Where sequences of these lengths live in the cache: blocks in random order, and some that belong to nobody."""

    def __init__(self, make: Make, lengths: Sequence[int], block_size: int = 16) -> None:
        self.lengths, self.block_size = list(lengths), block_size
        needed = [-(-length // block_size) for length in lengths]
        self.blocks = sum(needed) + 3
        free = make.rng.sample(range(self.blocks), self.blocks)
        self.tables = [[free.pop() for _ in range(count)] for count in needed]
        self.starts = [sum(lengths[:s]) for s in range(len(lengths))]  # each sequence's rows in flat tensors

    def step(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of a step in flat tensors, their spans [B, 3] and tables [B, P]."""
        spans, rows, first = [], [], 0
        width = max((-(-until // self.block_size) for _, _, until in step), default=0)
        tables = [(self.tables[s] + [0] * width)[:width] for s, _, _ in step]
        for s, start, until in step:
            spans.append((first, until - start, until))
            rows += range(self.starts[s] + start, self.starts[s] + until)
            first += until - start
        rows_T, spans_B3, tables_BP = (torch.tensor(values, dtype=torch.int64) for values in (rows, spans, tables))
        return rows_T, spans_B3.view(-1, 3), tables_BP.view(len(step), width)

    def whole(self) -> list[Step]:
        """Every sequence at once."""
        return [[(s, 0, length) for s, length in enumerate(self.lengths)]]

    def singles(self, most: int = 200) -> list[Step]:
        """Token by token, all sequences together until each ends; of longer ones only the last `most` tokens."""
        first = [(s, 0, length - most) for s, length in enumerate(self.lengths) if length > most]
        starts = [max(0, length - most) for length in self.lengths]
        steps = [
            [(s, start + t, start + t + 1) for s, start in enumerate(starts) if start + t < self.lengths[s]]
            for t in range(min(most, max(self.lengths)))
        ]
        return [first, *steps] if first else steps

    def chunks(self, make: Make, largest: int) -> list[Step]:
        """Some sequences in each step, in any order, with chunks of random sizes: often one token."""
        done, steps = [0] * len(self.lengths), []
        while todo := [s for s, length in enumerate(self.lengths) if done[s] < length]:
            step = []
            for s in make.rng.sample(todo, make.rng.randint(1, len(todo))):
                size = min(make.rng.choice([1, make.rng.randint(1, largest)]), self.lengths[s] - done[s])
                step.append((s, done[s], done[s] + size))
                done[s] += size
            steps.append(step)
        return steps


@dataclass
class AttendCase:
    """Write to the cache, then attend. Slots without a value yet are NaN. Without values, the first `values`
    elements of the keys are these."""

    layout: Layout
    q_THC: Tensor
    k_TGC: Tensor
    v_TGC: Tensor | None
    rules: Attention
    dtype: torch.dtype
    values: int = 0

    def cache(self) -> Tensor:
        kv_heads, head = self.k_TGC.shape[1:]
        shape = (1 if self.values else 2, self.layout.blocks * self.layout.block_size, kv_heads, head)
        return unwritten(shape, self.dtype)

    def run(self, schedule: list[Step]) -> Tensor:
        """[T, H, V]: each row as it came out in its step."""
        cache, out = self.cache(), torch.zeros_like(self.q_THC[..., : self.values or None])
        size, mask = self.layout.block_size, mask_params(self.rules).arguments()
        for rows, spans, tables in map(self.layout.step, schedule):
            ops.write_cache(self.k_TGC[rows], self.v_of(rows), cache, spans, tables, size)
            out[rows] = ops.attend(self.q_THC[rows], cache, spans, tables, size, self.values, *mask)
        return out

    def expected(self) -> Tensor:
        outs, (kv_heads, head) = [], self.k_TGC.shape[1:]
        cache = Slots(self.layout.blocks * self.layout.block_size, kv_heads, head, *self.kept)
        for rows, spans, tables in map(self.layout.step, in_pieces(self.layout)):
            cache.write(self.k_TGC[rows], self.v_of(rows), spans, tables)
            outs.append(reference_attention.attend(self.q_THC[rows], cache, spans, tables, self.rules))
        return torch.cat(outs)

    @property
    def kept(self) -> tuple[int, torch.dtype, int]:
        """Block size, dtype and values of the cache."""
        return self.layout.block_size, self.dtype, self.values

    def v_of(self, rows: Tensor) -> Tensor | None:
        return None if self.v_TGC is None else self.v_TGC[rows]


def unwritten(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A cache that holds nothing but NaN; in int8 these are the scales, behind each row."""
    if dtype == torch.int8:
        return torch.full((*shape[:-1], shape[-1] + SCALE_BYTES), -1, dtype=dtype)
    return torch.full(shape, torch.nan, dtype=dtype)


def mask_params(rules: Attention) -> MaskParams:
    return MaskParams(rules.scale, rules.window, rules.chunk, rules.softcap, rules.sinks)


def slots(layout: Layout, cache: Tensor, values: int = 0) -> Slots:
    return Slots(*cache.shape[1:], layout.block_size, cache.dtype, values)


def in_pieces(layout: Layout) -> list[Step]:
    """Chunk by chunk, so that the reference's scores fit the memory."""
    return [
        [(s, start, min(length, start + 256))]
        for s, length in enumerate(layout.lengths)
        for start in range(0, length, 256)
    ]


def attend_case(
    make: Make, lengths: Sequence[int], heads: int, kv_heads: int, head: int, dtype: torch.dtype, **rest: Any
) -> AttendCase:
    """`rest`: block_size, window, chunk, softcap, sinks, values."""
    layout, tokens, values = Layout(make, lengths, rest.get("block_size", 16)), sum(lengths), rest.get("values", 0)
    q, k, v = (make.normal(tokens, number, head) for number in (heads, kv_heads, kv_heads))
    return AttendCase(layout, q, k, None if values else v, rules_of(make, heads, head, **rest), dtype, values)


def rules_of(make: Make, heads: int, head: int, **rest: Any) -> Attention:
    sinks = make.normal(heads) if rest.get("sinks") else None
    sizes = (rest.get("window", 0), rest.get("chunk", 0))
    return Attention(1.5 * head**-0.5, *sizes, rest.get("softcap", 0.0), sinks)


@dataclass
class AttentionCase:
    """x += attention(norm(x)), the whole block."""

    layout: Layout
    x_TD: Tensor
    block: AttentionBlock
    qkv: Packed
    out: Packed
    cache_shape: tuple[int, ...]
    dtype: torch.dtype

    def params(self) -> AttentionParams:
        b, (kv_heads, head_width) = self.block, self.cache_shape[2:]
        return AttentionParams(
            norm=norm_params(b.norm),
            qkv=self.qkv,
            qkv_bias=b.qkv.bias,
            q_norm=b.q_norm,
            k_norm=b.k_norm,
            norm_per_head=b.norm_per_head,
            clip=b.clip,
            rotary=b.rotary,
            out=self.out,
            out_bias=b.out.bias,
            heads=b.heads,
            kv_heads=kv_heads,
            head_width=head_width,
            mask=mask_params(b.rules),
            norm_after_rotary=b.norm_after,
            query_scale=b.query_scale,
            gated=b.gated,
            residual_scale=b.residual_scale,
        )

    def run(self, schedule: list[Step]) -> Tensor:
        cache = unwritten(self.cache_shape, self.dtype)
        out = torch.zeros_like(self.x_TD)
        for rows, spans, tables in map(self.layout.step, schedule):
            x_TD = self.x_TD[rows]
            ops.attention_block(x_TD, cache, spans, tables, self.layout.block_size, *self.params().arguments())
            out[rows] = x_TD
        return out

    def expected(self) -> Tensor:
        cache = slots(self.layout, torch.empty(self.cache_shape, dtype=self.dtype))
        out = torch.zeros_like(self.x_TD, dtype=torch.float64)
        for rows, spans, tables in map(self.layout.step, in_pieces(self.layout)):
            out[rows] = reference_attention.attention_block(self.x_TD[rows], cache, spans, tables, self.block)
        return out


def attention_case(
    make: Make, lengths: Sequence[int], config: DecoderConfig, kind: Kind, norm_per_head: bool = False, **rest: Any
) -> AttentionCase:
    """`rest`: block_size, window, chunk, softcap, sinks. The cache is bfloat16 unless the weights are float32."""
    c, shape, layout = config, config.attention[0], Layout(make, lengths, rest.get("block_size", 16))
    assert isinstance(shape, shapes.Attention)
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    outputs, tables = queries * (2 if shape.gated else 1) + 2 * keys, Tables(max(lengths))
    qkv, out = pack(make.weight(outputs, c.width), kind), pack(make.weight(c.width, queries), kind)
    biases = [make.normal(n) if shape.bias else None for n in (outputs, c.width)]
    norms = [None, None]
    if shape.qk_norm != "none":
        sizes = (shape.head_width,) * 2 if norm_per_head else (queries, keys)
        norms = [1 + make.normal(size, scale=0.1) for size in sizes]
    block = AttentionBlock(
        make.norm(c.norm, c.width),
        *(Weight.of(packed, 1, bias) for packed, bias in zip((qkv, out), biases, strict=True)),
        shape.heads,
        rules_of(make, shape.heads, shape.head_width, **rest),
        *norms,
        norm_per_head,
        shape.clip or 0.0,
        None if shape.rope is None else tables.rotary(shape.rope),
        shape.qk_norm == "unit",
        tables.query_scale(shape),
        shape.gated,
        c.residual_scale,
    )
    dtype = torch.float32 if kind == "float" else torch.bfloat16
    size = (2, layout.blocks * layout.block_size, shape.kv_heads, shape.head_width)
    return AttentionCase(layout, make.normal(sum(lengths), c.width), block, qkv, out, size, dtype)


def with_rows(case: AttentionCase, rows_TD: Tensor) -> AttentionCase:
    """The same layer over other rows."""
    return replace(case, x_TD=rows_TD)
