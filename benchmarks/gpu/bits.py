"""Whether a row's bits depend on the row alone: in every tile, with any number of warps, with segments in turn or side
by side, alone and among 200 rows. In the interpreter bits say nothing: numpy's products may add in another order.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import shapes
from benchmarks.gpu.pages import mask_of, paged
from benchmarks.gpu.part import Part
from benchmarks.gpu.shapes import LayerShape
from model.backends.cuda.infinity import infinity_layer
from model.backends.cuda.kernels.align import align, empty_tiles
from model.backends.cuda.kernels.gemm import gemm
from model.backends.cuda.kernels.norm import Norm, residual_norm
from model.backends.cuda.kernels.operands import TILES, PairTiles, Tile, Weight
from model.backends.cuda.layer import moe_layer
from model.batch import LayerBudget
from model.step import LayerStep

BITS = "bits of a row"
DTYPE = torch.bfloat16


class Bits:
    """Compares what should be the same bits, and gives a row for each kind of comparison."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def check(self, kernel: str, what: str, found: list[Tensor], wanted: Tensor, must: bool = True) -> None:
        """`found` are all ways to compute `wanted`."""
        different, most = 0, 0.0
        for one in found:
            different += int(not torch.equal(one, wanted))
            most = max(most, float((one.float() - wanted.float()).abs().max()))
        unknown = self.part.dry
        self.part.add(BITS, kernel=kernel, what=what, ways=len(found), different=None if unknown else different,
                      largest=None if unknown else most, equal=None if unknown else different == 0,
                      promised=must)  # fmt: skip


def run(part: Part) -> None:
    """All kernels, each with the sizes of every shape."""
    dtype = torch.float32 if part.dry else DTYPE
    bits, many = Bits(part), 5 if part.dry else 200
    jobs: list[tuple[str, Callable[[], None]]] = []
    for shape in shapes.shapes(part.dry)[-1 if part.dry else 0 :]:
        jobs.append((f"bits of {shape.name}, dense", partial(_dense, bits, shape, many, dtype)))
        jobs.append((f"bits of {shape.name}, routed pairs", partial(_pairs, bits, shape, many, dtype)))
        jobs.append((f"bits of {shape.name}, mixture", partial(_mixture, bits, shape, many, dtype)))
        jobs.append((f"bits of {shape.name}, attention", partial(_attention, bits, shape, dtype)))
    jobs.append(("bits of the norm", partial(_norm, bits, many, dtype)))
    jobs.append(("bits of ∞-MoE", partial(_infinity, bits, dtype)))
    part.share(jobs)


def _tiles(dry: bool) -> Iterator[Tile]:
    """The tiles in use, and some with other warps, stages and widths."""
    if dry:
        yield from (TILES[16], TILES[128])
        return
    yield from TILES.values()
    for tile in (TILES[16], TILES[64]):
        yield replace(tile, warps=12 - tile.warps)  # 8 for 4, 4 for 8
        yield replace(tile, stages=2)
        yield replace(tile, units=192 - tile.units)  # 128 for 64, 64 for 128


def _weights(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> dict[str, Weight]:
    """Dense matrices of the layer's sizes."""
    attention, width = shape.attention, shape.width
    heads = (attention.heads + 2 * attention.kv_heads) * attention.head_width
    sizes = {"qkv": (heads, width), "out": (width, attention.heads * attention.head_width)}
    sizes["router"] = (shape.moe.experts, width)
    made = {}
    for name, (outputs, inner) in sizes.items():
        values_OD = shapes.rows(outputs, inner, device, torch.float32) * inner**-0.5
        made[name] = Weight(values_OD.to(dtype)[None])
    return made


def _dense(bits: Bits, shape: LayerShape, many: int, dtype: torch.dtype) -> None:
    device, dry = bits.part.device, bits.part.dry
    for name, weight in list(_weights(shape, device, dtype).items())[: 1 if dry else None]:
        x_TD = shapes.rows(many, weight.values_EOD.shape[2], device, dtype)
        alone_1U = torch.empty(1, weight.units, device=device)
        at = many - 3
        gemm(x_TD[at, None], weight, alone_1U, side_by_side=False)
        found, other = [], []
        for tile in _tiles(dry):
            for at_once in (False, True):
                out_TU = torch.empty(many, weight.units, device=device)
                gemm(x_TD, weight, out_TU, tile=tile, side_by_side=at_once)
                found.append(out_TU[at, None])
        bits.check("gemm", f"{shape.name} {name}, {weight.segments} segments", found, alone_1U)
        for warps in () if dry else (1, 2):
            out_1U = torch.empty_like(alone_1U)
            gemm(x_TD[at, None], weight, out_1U, tile=replace(TILES[16], warps=warps))
            other.append(out_1U)
        if other:
            bits.check("gemm", f"{shape.name} {name}, fewer than 4 warps (mma.sync)", other, alone_1U, must=False)


def _pairs(bits: Bits, shape: LayerShape, many: int, dtype: torch.dtype) -> None:
    """Experts' gates and ups: every pair in tiles of each height and as a tile of its own."""
    device, experts, k_max = bits.part.device, shape.moe.experts, 3
    layer = moe_layer(shapes.mixture(shape, device, dtype))
    x_TD, weight = shapes.rows(many, shape.width, device, dtype), layer.gate_up
    order_TE = torch.rand(many, experts, generator=torch.Generator().manual_seed(1)).argsort(-1)
    expert_TK = order_TE[:, :k_max].int().contiguous()
    expert_TK[::4, 1:] = experts  # tokens with one expert
    expert_TK = expert_TK.to(device)
    runs_R = expert_TK.flatten() < experts
    pairs = expert_TK.numel()
    single_RU = torch.empty(pairs, weight.units, device=device)
    gemm(x_TD, weight, single_RU, PairTiles(expert_TK.flatten(), None, pairs), k_max, side_by_side=False)
    found = []
    for tile in _tiles(bits.part.dry):
        tiles = empty_tiles(pairs, experts, tile.rows, expert_TK)
        align(expert_TK, tiles, expert_TK.new_empty(experts))
        for at_once in (False, True):
            out_RU = torch.empty_like(single_RU)
            gemm(x_TD, weight, out_RU, tiles, k_max, tile, at_once)
            found.append(out_RU[runs_R])
    bits.check("gemm", f"{shape.name} routed pairs, {weight.segments} segments", found, single_RU[runs_R])


def _mixture(bits: Bits, shape: LayerShape, many: int, dtype: torch.dtype) -> None:
    """The whole layer: route, align, products, combine and the next norm."""
    device, layer = bits.part.device, moe_layer(shapes.mixture(shape, bits.part.device, dtype))
    x_TD = shapes.rows(many, shape.width, device, dtype)
    counts_T = 1 + torch.arange(many, device=device) % shape.moe.trained
    norm = Norm(torch.ones(shape.width, device=device, dtype=dtype), 1e-5)

    def out(rows: slice, k_max: int) -> Tensor:
        residual_TD, out_TD = x_TD[rows].clone(), torch.empty_like(x_TD[rows])
        layer(x_TD[rows], counts_T[rows], k_max, residual_TD, norm, out_TD)
        return torch.cat([residual_TD, out_TD], dim=1)

    together_TD = out(slice(None), shape.moe.trained)
    for token in (0,) if bits.part.dry else (0, 1, many // 2):
        one = slice(token, token + 1)
        count = int(counts_T[token])
        found = [out(one, count), out(one, shape.moe.trained)]
        found.append(out(slice(token, token + 30), shape.moe.trained)[:1])
        bits.check("mixture", f"{shape.name} token {token}, K = {count}", found, together_TD[one])


def _attention(bits: Bits, shape: LayerShape, dtype: torch.dtype) -> None:
    """The last token of a sequence: decoded alone, beside others, and as the end of chunks."""
    dry, device = bits.part.dry, bits.part.device
    long, chunk, others = (70, 3, 1) if dry else (3000, 100, 60)
    steps = [(1, long), (chunk, chunk), *((1, 70 + 7 * number) for number in range(others))]
    for window in (20,) if dry else (0, 128):
        spec = mask_of(shape.attention, device, window)
        batch = paged(shape.attention, steps, device, dtype)
        for sequence, context in ((0, long), (1, chunk)):
            alone = batch.alone(sequence, 1).run(spec, side_by_side=False)
            last = batch.spans[sequence].first + batch.spans[sequence].rows - 1
            found = [
                batch.run(spec, rows, at_once)[last, None]
                for rows in ((4,) if dry else (1, 4, 32))
                for at_once in (False, True)
            ]
            found.append(batch.alone(sequence, 1).run(spec, side_by_side=True))
            what = f"{shape.name} context {context}, window {window}"
            bits.check("attend", what, found, alone)


def _norm(bits: Bits, many: int, dtype: torch.dtype) -> None:
    device = bits.part.device
    for width in (64,) if bits.part.dry else (2048, 2880):
        x_TD = shapes.rows(many, width, device, dtype)
        norm, out_TD = Norm(torch.ones(width, device=device, dtype=dtype), 1e-5), torch.empty_like(x_TD)
        residual_norm(x_TD, norm, out_TD)
        alone_1D = torch.empty_like(x_TD[:1])
        residual_norm(x_TD[-1:].clone(), norm, alone_1D)
        bits.check("norm", f"width {width}", [out_TD[-1:]], alone_1D)


def _infinity(bits: Bits, dtype: torch.dtype) -> None:
    """Masks and both products; every draw of a token alone and among others."""
    device, tokens = bits.part.device, 3 if bits.part.dry else 120
    kind, width = shapes.infinity_shape(bits.part.dry), 32 if bits.part.dry else 768
    layer = infinity_layer(shapes.infinity(kind, width, device, dtype))
    x_TD = shapes.rows(tokens, width, device, dtype)
    counts_T = 1 + torch.arange(tokens, device=device) % kind.maximum
    seeds_T, positions_T = torch.full_like(counts_T, 5), torch.arange(tokens, device=device)

    def out(rows: slice, k_max: int) -> Tensor:
        budget = LayerBudget(counts_T[rows], k_max)
        return layer(x_TD[rows], LayerStep(budget, seeds_T[rows], positions_T[rows]))

    together_TD = out(slice(None), kind.maximum)
    for token in (0, tokens // 2, tokens - 1):
        one = slice(token, token + 1)
        found = [out(one, int(counts_T[token])), out(slice(token, token + 20), kind.maximum)[:1]]
        bits.check("∞-MoE", f"token {token}, K = {int(counts_T[token])}", found, together_TD[one])
