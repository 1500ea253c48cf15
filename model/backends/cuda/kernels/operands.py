"""What the matrix product is given beside rows: weights, routed pairs in tiles, and the sizes of a program.

No Triton here: these are values of the host, made when a model is loaded or a step is planned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PROGRAMS = 264  # two for each processor of an H100: fewer, and segments run side by side
MIN_SEGMENT = 512  # inner elements
PACKED = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}  # the dtypes that have scales
WORD = 4  # values of 8 bits that a kernel reads as one


@dataclass(frozen=True, slots=True)
class Weight:
    """Weights [E, outputs, inner] of E experts; a dense layer is one expert that every row uses.

    `gated`: half of the outputs are gates, first or, `interleaved`, at even places; there are half as many units.
    Values of 8 bits are multiplied by the scale of their output.
    """

    values_EOD: Tensor
    bias_EO: Tensor | None = None
    activation: str = "none"
    gated: bool = False
    interleaved: bool = False
    scale_EO: Tensor | None = None  # float32, if and only if the values have 8 bits

    @property
    def packed(self) -> str:
        """The format of values of 8 bits, or "none"."""
        return PACKED.get(self.values_EOD.dtype, "none")

    @property
    def stored(self) -> Tensor:
        """The values as a kernel reads them: those of 8 bits four at a time, as int32."""
        return self.values_EOD if self.packed == "none" else self.values_EOD.view(torch.int32)

    @property
    def units(self) -> int:
        """Columns of the result."""
        return self.values_EOD.shape[1] // (1 + self.gated)

    @property
    def segments(self) -> int:
        """How often the inner dimension is cut: more for weights whose outputs alone keep few programs busy."""
        tiles = -(-self.units // 64)
        return max(1, min(8, -(-PROGRAMS // tiles), self.values_EOD.shape[2] // MIN_SEGMENT))


@dataclass(frozen=True, slots=True)
class PairTiles:
    """Routed pairs in N tiles of one expert each, as `align` lays them out.

    Pair p belongs to row p // k_max of the tokens. Without `pair_NR` tile n is pair n alone.
    """

    expert_N: Tensor  # int32; the number of experts: the tile is empty
    pair_NR: Tensor | None  # int32; the number of pairs: the row is empty
    pairs: int  # tokens times k_max


@dataclass(frozen=True, slots=True)
class Tile:
    """The sizes of one program, with which no output's arithmetic changes except by `inner`."""

    units: int = 64
    rows: int = 16
    inner: int = 64
    warps: int = 4
    stages: int = 4


TILES = {  # by rows: what two accumulators of a gated product leave room for
    16: Tile(64, 16),
    32: Tile(64, 32),
    64: Tile(128, 64, warps=8, stages=3),
    128: Tile(64, 128, warps=8, stages=3),
}
