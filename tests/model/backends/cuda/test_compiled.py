"""Every kernel compiles for sm_90 at the sizes of real models: without spilling, within a program's shared memory, with
loads of 16 bytes, and with the warp-group matrix instruction where it is a matrix product."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets kernels in this process", allow_module_level=True)

from model.backends.cuda.kernels.gemm import TILES, PairTiles, Tile, Weight, gemm
from tests.model.backends.cuda.compiled import SHARED, Compiled, record

WIDTH, EXPERTS, EXPERT_WIDTH, K_MAX = 2048, 64, 1024, 8  # of OLMoE-1B-7B


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int32)


def fits(made: Compiled) -> None:
    assert made.stack == 0, f"{made.name} spills {made.stack} bytes"
    assert made.shared <= SHARED
    assert made.wide_loads


@pytest.mark.parametrize("tile", TILES.values())
@pytest.mark.parametrize("split", [False, True])
def test_gemm(tile: Tile, split: bool) -> None:
    """Gated in turn, where a program holds the most; plain side by side."""
    gated = not split
    weight = Weight(empty(EXPERTS, 2048, WIDTH), activation="silu" if gated else "none", gated=gated)
    pairs = PairTiles(ints(100), ints(100, tile.rows), 9 * K_MAX)
    with record() as found:
        gemm(empty(9, WIDTH), weight, empty(9 * K_MAX, weight.units), pairs, K_MAX, tile, side_by_side=split)
    assert [made.name for made in found] == ["_gemm", "_merge"][: 1 + split]
    assert found[0].tensor_cores
    for made in found:
        fits(made)
