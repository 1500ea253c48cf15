"""Multi-head latent attention with random weights, over sequences whose rows come in any chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.backends.cpu.attention import rotary_table
from model.backends.cpu.kernels.attention_params import LatentParams
from model.backends.cpu.kernels.pack import Kind, Packed, pack
from model.backends.cpu.kernels.reference import Weight
from model.backends.cpu.kernels.reference_attention import Attention
from model.backends.cpu.kernels.reference_latent import LatentBlock, latent_block
from model.backends.cpu.layout import padded
from model.shapes.rope import Rope
from tests.model.backends.cpu.kernels.cases import Make, norm_params, ops
from tests.model.backends.cpu.kernels.pages import Layout, Step, in_pieces, mask_params, slots


@dataclass
class LatentCase:
    """x += latent attention(norm(x)), the whole block. Slots without a value yet are NaN."""

    layout: Layout
    x_TD: Tensor
    block: LatentBlock
    packed: dict[str, Packed]
    dtype: torch.dtype

    def params(self) -> LatentParams:
        b = self.block
        parts: dict[str, Any] = {name: norm_params(getattr(b, name)) for name in ("norm", "query_norm", "latent_norm")}
        return LatentParams(
            **parts | self.packed,
            down_bias=None if b.down.bias is None else padded(b.down.bias),
            out_bias=b.out.bias,
            rotary=b.rotary,
            heads=b.heads,
            query_rank=b.query_rank,
            rank=b.rank,
            plain_width=b.plain_width,
            value_width=self.packed["to_values"].n,
            mask=mask_params(b.rules),
            residual_scale=b.residual_scale,
        )

    def cache(self) -> Tensor:
        shape = (1, self.layout.blocks * self.layout.block_size, 1, self.block.rank + self.block.turned)
        return torch.full(shape, torch.nan, dtype=self.dtype)

    def run(self, schedule: list[Step]) -> Tensor:
        cache, out = self.cache(), torch.zeros_like(self.x_TD)
        for rows, spans, tables in map(self.layout.step, schedule):
            x_TD = self.x_TD[rows]
            ops.latent_block(x_TD, cache, spans, tables, self.layout.block_size, *self.params().arguments())
            out[rows] = x_TD
        return out

    def expected(self) -> Tensor:
        cache, out = slots(self.layout, self.cache(), self.block.rank), torch.zeros_like(self.x_TD).double()
        for rows, spans, tables in map(self.layout.step, in_pieces(self.layout)):
            out[rows] = latent_block(self.x_TD[rows], cache, spans, tables, self.block)
        return out


def latent_case(make: Make, lengths: Sequence[int], kind: Kind, bias: bool = False, **rest: Any) -> LatentCase:
    """`rest`: block_size and sizes. The cache is bfloat16 unless the weights are float32."""
    layout = Layout(make, lengths, rest.get("block_size", 16))
    sizes = {"heads": 3, "query_rank": 20, "rank": 32, "plain": 12, "turned": 16, "values": 16, "width": 40}
    heads, low, rank, plain, turned, values, width = (rest.get(name, size) for name, size in sizes.items())
    shapes = {
        "down": (low + rank + turned, width),
        "query": (heads * (plain + turned), low or width),
        "to_keys": (heads, rank, plain),
        "to_values": (heads, values, rank),
        "out": (width, heads * values),
    }
    packed = {name: pack(make.weight(*shape), kind) for name, shape in shapes.items()}
    biases = {name: make.normal(packed[name].n) for name in ("down", "out") if bias}
    counts = {"to_keys": heads, "to_values": heads}
    weights = {name: Weight.of(packed[name], counts.get(name, 1), biases.get(name)) for name in shapes}
    block = LatentBlock(
        make.norm("rms", width),
        make.norm("rms" if low else "none", low),
        make.norm("rms", rank),
        **weights,
        rotary=rotary_table(Rope(turned), max(lengths)),
        heads=heads,
        query_rank=low,
        rank=rank,
        plain_width=plain,
        rules=Attention(1.5 * (plain + turned) ** -0.5),
        residual_scale=0.5 if bias else 1.0,
    )
    dtype = torch.float32 if kind == "float" else torch.bfloat16
    return LatentCase(layout, make.normal(sum(lengths), width), block, packed, dtype)
