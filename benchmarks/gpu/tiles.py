"""What fixed arithmetic costs: the product of each size as it runs, beside the fastest of all tiles and segments, which
only a mode that promises no bits could choose for each batch. It also shows which tiles to change.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import shapes
from benchmarks.gpu.part import Part
from benchmarks.gpu.shapes import LayerShape
from benchmarks.gpu.timing import Timed, timed
from model.backends.cuda.kernels.align import align, empty_tiles
from model.backends.cuda.kernels.gemm import gemm
from model.backends.cuda.kernels.operands import TILES, PairTiles, Tile, Weight
from model.backends.cuda.layer import row_tile

TOKENS = (1, 8, 32, 128, 1024)
MAX_LOSS = 1.1  # exact mode at most 10 % slower than a free one
COPIES = 2
CUTS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Cut(Weight):
    """A weight that is cut into so many segments, whatever its shape."""

    cut: int = 1

    @property
    def segments(self) -> int:
        """As given."""
        return self.cut


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix of a layer, dense or of experts, in several copies, and the inputs of one batch."""

    name: str
    weights: list[Weight]
    x_TD: Tensor
    experts_NTK: Tensor | None  # int32; the choices of as many inputs as there are copies

    @property
    def k_max(self) -> int:
        """Pairs of a token."""
        return 1 if self.experts_NTK is None else self.experts_NTK.shape[2]

    def time(self, tile: Tile, cut: int | None, seconds: float) -> Timed:
        """Of one launch, or two where segments are merged."""
        device, rows = self.x_TD.device, len(self.x_TD) * self.k_max
        out_RU = torch.empty(rows, self.weights[0].units, device=device, dtype=self.x_TD.dtype)
        calls = []
        for number, weight in enumerate(self.weights):
            given = weight if cut is None else _cut(weight, cut)
            calls.append(partial(gemm, self.x_TD, given, out_RU, self._pairs(number, tile), self.k_max, tile))
        return timed(calls, device, seconds)

    def _pairs(self, number: int, tile: Tile) -> PairTiles | None:
        if self.experts_NTK is None:
            return None
        expert_TK, experts = self.experts_NTK[number], self.weights[0].values_EOD.shape[0]
        if expert_TK.numel() <= experts // 4:
            return PairTiles(expert_TK.flatten(), None, expert_TK.numel())
        tiles = empty_tiles(expert_TK.numel(), experts, tile.rows, expert_TK)
        align(expert_TK, tiles, expert_TK.new_empty(experts))
        return tiles


def _cut(weight: Weight, cut: int) -> Cut:
    return Cut(weight.values_EOD, None, weight.activation, weight.gated, weight.interleaved, cut=cut)


def run(part: Part) -> None:
    """Gates and ups of experts, and queries, keys and values, of every shape."""
    dtype = torch.float32 if part.dry else torch.bfloat16
    chosen = shapes.shapes(part.dry)[0 : 1 if part.dry else 2]
    tokens = (2,) if part.dry else TOKENS
    if not part.dry:
        part.share([(f"compiling {tile}", partial(_compile, part, chosen[0], tile, dtype)) for tile in _tiles(False)])
    for shape in chosen:
        for rows in tokens:
            with part.tried(f"tiles of {shape.name}, {rows} tokens"), torch.inference_mode():
                for product in _products(part, shape, rows, dtype):
                    _best(part, product)


def _tiles(dry: bool) -> Iterator[Tile]:
    """The tiles in use and their neighbours."""
    if dry:
        yield TILES[16]
        return
    for tile in TILES.values():
        for units in (64, 128):
            for inner in (64, 128):
                yield replace(tile, units=units, inner=inner)


@torch.inference_mode()
def _compile(part: Part, shape: LayerShape, tile: Tile, dtype: torch.dtype) -> None:
    for product in _products(part, shape, 32, dtype):
        for cut in (1, 4):
            with part.tried(f"{tile}, {cut} segments"):
                product.time(tile, cut, 0.0)


def _products(part: Part, shape: LayerShape, rows: int, dtype: torch.dtype) -> list[Product]:
    """Both products of one batch."""
    device, copies = part.device, 1 if part.dry else COPIES
    attention, moe = shape.attention, shape.moe
    outputs = (attention.heads + 2 * attention.kv_heads) * attention.head_width
    x_TD = shapes.rows(rows, shape.width, device, dtype)
    dense = [Weight(shapes.rows(outputs, shape.width, device, dtype, seed)[None]) for seed in range(8 * copies)]
    size = (moe.experts, 2 * moe.width, shape.width)
    routed = [Weight(torch.randn(size, device=device, dtype=dtype), None, moe.activation, True) for _ in range(copies)]
    order_NTE = torch.rand(copies, rows, moe.experts, generator=torch.Generator().manual_seed(rows)).argsort(-1)
    experts_NTK = order_NTE[:, :, : moe.trained].int().contiguous().to(device)
    name = f"{shape.name}, {rows} tokens"
    return [Product(f"{name}: gates and ups", routed, x_TD, experts_NTK),
            Product(f"{name}: queries, keys and values", dense, x_TD, None)]  # fmt: skip


def _best(part: Part, product: Product) -> None:
    """The product as it runs, and the fastest way of all."""
    if not part.enough(product.name, 2):
        return
    own_tile = _own_tile(product)
    own = product.time(own_tile, None, 0.05)
    best, best_us, ways, failed = "as it is", own.micro, 0, 0
    for tile in _tiles(part.dry):
        for cut in _cuts(product.weights, part.dry):
            ways += 1
            try:
                micro = product.time(tile, cut, 0.005).micro
            except Exception:  # too much shared memory, or what `_compile` has named
                failed += 1
                continue
            if micro is not None and best_us is not None and micro < best_us:
                best, best_us = f"{tile.units}×{tile.rows}×{tile.inner}, {cut} segments", micro
    loss = None if own.micro is None or best_us is None else own.micro / best_us
    ours = f"{own_tile.units}×{own_tile.rows}×{own_tile.inner}, {product.weights[0].segments} segments"
    part.add("exact against free", product=product.name, ours=ours, ours_us=own.micro, free=best, free_us=best_us,
             ways=ways, failed=failed, ratio=loss, most=MAX_LOSS,
             holds=None if loss is None else loss <= MAX_LOSS)  # fmt: skip


def _own_tile(product: Product) -> Tile:
    """As the layer chooses it."""
    rows = len(product.x_TD) * product.k_max
    return row_tile(rows if product.experts_NTK is None else rows // product.weights[0].values_EOD.shape[0])


def _cuts(weights: Sequence[Weight], dry: bool) -> Sequence[int]:
    """Segments of at least two steps each."""
    inner = weights[0].values_EOD.shape[2]
    return CUTS[:1] if dry else [cut for cut in CUTS if inner // cut >= 256]
