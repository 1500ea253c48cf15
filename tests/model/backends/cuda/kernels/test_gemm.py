"""The matrix product against float64: every way to name rows, both ways to add segments, nothing written beside."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from model.backends.cuda.kernels import operands, reference
from model.backends.cuda.kernels.gemm import gemm
from model.backends.cuda.kernels.operands import PairTiles, Tile, Weight
from model.backends.cuda.kernels.weights import e4m3, e4m3_bits
from model.backends.cuda.quantise import quantised
from model.options import Quantize

WIDTH, EXPERTS = 80, 5
UNTOUCHED = -77.0


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def three_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The width of these tests is cut as wide weights are: 32 elements, 32, and the rest."""
    monkeypatch.setattr(operands, "MIN_SEGMENT", 26)


def small(rows: int = 16, units: int = 64) -> Tile:
    return Tile(units, rows, inner=16)


def expected(x_TD: Tensor, weight: Weight, expert: int = 0) -> Tensor:
    bias_O = None if weight.bias_EO is None else weight.bias_EO[expert]
    name = None if weight.activation == "none" else weight.activation
    values_OD = weight.values_EOD[expert].double()
    if weight.scale_EO is not None:
        values_OD = values_OD * weight.scale_EO[expert, :, None].double()
    return reference.linear(x_TD, values_OD, bias_O, name, weight.gated, weight.interleaved)


def close(found: Tensor, wanted: Tensor) -> None:
    tolerance = 2e-5 if found.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


WEIGHTS = [
    {"activation": "none"},
    {"activation": "gelu", "bias": True},
    {"activation": "relu"},
    {"activation": "gelu_tanh"},
    {"activation": "silu", "gated": True},
    {"activation": "gelu_tanh", "gated": True},
    {"activation": "silu", "gated": True, "bias": True},
    {"activation": "swiglu_clamped", "gated": True, "interleaved": True, "bias": True},
]


def weight_of(case: dict, outputs: int = 136, dtype: torch.dtype = torch.float32, experts: int = 1) -> Weight:
    options = dict(case)
    bias_EO = random(experts, outputs, seed=3) if options.pop("bias", False) else None
    scale = 3 * WIDTH**-0.5  # so that clamps are met
    return Weight((random(experts, outputs, WIDTH, seed=2) * scale).to(dtype), bias_EO, **options)


HALF = [(torch.float16, case) for case in (WEIGHTS[0], WEIGHTS[7])]


@pytest.mark.parametrize(("dtype", "case"), [(torch.float32, case) for case in WEIGHTS] + HALF)
@pytest.mark.parametrize("at_once", [False, True])
def test_a_dense_layer(dtype: torch.dtype, case: dict, at_once: bool, three_segments: None) -> None:
    x_TD, weight = random(19, WIDTH, dtype=dtype), weight_of(case, dtype=dtype)
    assert weight.segments == 3
    out_TU = torch.full((21, weight.units), UNTOUCHED, dtype=dtype)
    gemm(x_TD, weight, out_TU[:19], tile=small(), side_by_side=at_once)
    close(out_TU[:19], expected(x_TD, weight))
    assert (out_TU[19:] == UNTOUCHED).all()


def test_an_inner_dimension_that_is_no_multiple_of_a_step() -> None:
    x_TD, weight = random(3, WIDTH), weight_of(WEIGHTS[0])
    out_TU = torch.full((3, weight.units), torch.nan)
    gemm(x_TD, weight, out_TU, tile=Tile(64, 16, inner=64))
    close(out_TU, expected(x_TD, weight))


def choices(tokens: int, k_max: int) -> Tensor:
    """Experts [T, K] of mixed counts, from none to all; expert 2 is chosen by no token."""
    generator = torch.Generator().manual_seed(tokens)
    order_TE = torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)
    order_TE[order_TE == 2] = EXPERTS
    expert_TK = order_TE[:, :k_max].clone()
    counts_T = torch.arange(tokens) % (k_max + 1)
    expert_TK[torch.arange(k_max)[None] >= counts_T[:, None]] = EXPERTS
    return expert_TK


def pair_tiles(expert_TK: Tensor, rows: int, surplus: int = 2) -> PairTiles:
    tiles = reference.tiles_of(reference.pairs_of(expert_TK, EXPERTS), rows)
    pairs = expert_TK.numel()
    return PairTiles(*reference.laid_out(tiles, len(tiles) + surplus, rows, EXPERTS, pairs), pairs)


@pytest.mark.parametrize(
    ("dtype", "case", "k_max", "at_once"),
    [
        (torch.float32, WEIGHTS[0], 1, False),
        (torch.float32, WEIGHTS[4], 3, True),
        (torch.float32, WEIGHTS[7], 5, False),
        (torch.float32, WEIGHTS[7], 3, True),
        (torch.float16, WEIGHTS[4], 5, False),
        (torch.float16, WEIGHTS[0], 3, True),
    ],
)
def test_routed_pairs(dtype: torch.dtype, case: dict, k_max: int, at_once: bool, three_segments: None) -> None:
    x_TD, weight = random(23, WIDTH, dtype=dtype), weight_of(case, 72, dtype, EXPERTS)
    expert_TK = choices(23, k_max)
    out_RU = torch.full((23 * k_max, weight.units), UNTOUCHED, dtype=dtype)
    gemm(x_TD, weight, out_RU, pair_tiles(expert_TK, 16), k_max, small(), at_once)
    for pair, expert in enumerate(expert_TK.flatten().tolist()):
        if expert == EXPERTS:
            assert (out_RU[pair] == UNTOUCHED).all()
        else:
            close(out_RU[pair, None], expected(x_TD[pair // k_max, None], weight, expert))


@pytest.mark.parametrize("at_once", [False, True])
def test_single_pairs_equal_tiles_of_pairs(at_once: bool, three_segments: None, chains: None) -> None:
    x_TD, weight, expert_TK = random(4, WIDTH), weight_of(WEIGHTS[4], 72, experts=EXPERTS), choices(4, 3)
    tiled_RU, single_RU = (torch.full((12, weight.units), UNTOUCHED) for _ in range(2))
    gemm(x_TD, weight, tiled_RU, pair_tiles(expert_TK, 16), 3, small(), at_once)
    gemm(x_TD, weight, single_RU, PairTiles(expert_TK.flatten().int(), None, 12), 3, small(), at_once)
    assert torch.equal(tiled_RU, single_RU)


@pytest.mark.parametrize("kind", ["none", "int8-weights", "fp8-weights"])
def test_a_rows_bits_depend_on_nothing_else(kind: Quantize, three_segments: None, chains: None) -> None:
    """Alone or among 20 rows, in every tile, with segments in turn or side by side."""
    x_TD, weight = random(20, WIDTH), weight_of(WEIGHTS[6])
    weight = weight if kind == "none" else quantised(weight, kind)
    first_TU = torch.full((20, weight.units), torch.nan)
    gemm(x_TD, weight, first_TU, tile=small(), side_by_side=False)
    for rows, units, at_once in [(16, 64, True), (32, 128, False), (64, 64, True), (128, 64, False)]:
        out_TU = torch.full((20, weight.units), torch.nan)
        gemm(x_TD, weight, out_TU, tile=small(rows, units), side_by_side=at_once)
        assert torch.equal(out_TU, first_TU)
    for row in (0, 13, 19):
        alone_1U = torch.full((1, weight.units), torch.nan)
        gemm(x_TD[row, None], weight, alone_1U, tile=small(), side_by_side=False)
        assert torch.equal(alone_1U[0], first_TU[row])


def test_segments_are_sums_of_their_own(three_segments: None, chains: None) -> None:
    """1 + 2⁻²⁴ is 1 in float32: added one by one to a large first segment, the small ones would vanish."""
    values_D = torch.zeros(WIDTH)
    values_D[0], values_D[32:48] = 1.0, 2.0**-24
    out_11 = torch.full((1, 1), torch.nan)
    gemm(torch.ones(1, WIDTH), Weight(values_D[None, None]), out_11, tile=small())
    assert out_11.item() == 1 + 2.0**-20


def test_what_is_not_a_number_stays_in_its_row() -> None:
    x_TD, weight = random(5, WIDTH), weight_of(WEIGHTS[0])
    x_TD[3] = torch.nan
    out_TU = torch.zeros(5, weight.units)
    gemm(x_TD, weight, out_TU, tile=small())
    assert out_TU.isnan().all(1).tolist() == [False, False, False, True, False]


def test_segments_follow_from_the_weights_shape() -> None:
    def segments(outputs: int, inner: int) -> int:
        return Weight(torch.empty(1, outputs, inner, device="meta")).segments

    assert segments(2048, 2048) == 4  # 32 tiles are few for a GPU
    assert segments(2048, 1024) == 2  # no segment under 512
    assert segments(50304, 2048) == 1
    assert segments(64, 4096) == 8


@triton.jit
def _decode(byte, out, dtype: tl.constexpr, as_bits: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 256)
    given = tl.load(byte + at)
    tl.store(out + at, e4m3_bits(given, dtype) if as_bits else e4m3(given, dtype))


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_every_float8_is_decoded(name: str) -> None:
    """The interpreter cannot multiply in bfloat16: torch does, by the factor of float32, whose exponents are alike."""
    byte_N = torch.arange(256, dtype=torch.int32)
    wanted_N = byte_N.to(torch.uint8).view(torch.float8_e4m3fn).float()
    in_torch = name == "bfloat16"
    found_N = torch.zeros(256, dtype=torch.int16 if in_torch else getattr(torch, name))
    _decode[(1,)](byte_N + 0x5A00, found_N, getattr(tl, name), in_torch)  # what is above the low byte is another's
    if in_torch:
        found_N = found_N.view(torch.bfloat16) * 2.0**120
    number_N = ~wanted_N.isnan()
    assert number_N.sum() == 254 and torch.equal(found_N.float()[number_N], wanted_N[number_N])


KINDS: list[Quantize] = ["int8-weights", "fp8-weights"]
PACKED = [(torch.float32, case) for case in (WEIGHTS[1], WEIGHTS[4], WEIGHTS[7])] + [(torch.float16, WEIGHTS[7])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "case"), PACKED)
@pytest.mark.parametrize("at_once", [False, True])
def test_a_dense_layer_of_8_bits(
    kind: Quantize, dtype: torch.dtype, case: dict, at_once: bool, three_segments: None
) -> None:
    x_TD, weight = random(19, WIDTH, dtype=dtype), quantised(weight_of(case, dtype=dtype), kind)
    out_TU = torch.full((21, weight.units), UNTOUCHED, dtype=dtype)
    gemm(x_TD, weight, out_TU[:19], tile=small(), side_by_side=at_once)
    close(out_TU[:19], expected(x_TD, weight))
    assert (out_TU[19:] == UNTOUCHED).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [False, True])
def test_routed_pairs_of_8_bits(kind: Quantize, at_once: bool, three_segments: None, chains: None) -> None:
    """Against float64, and pairs in tiles of their own."""
    x_TD, expert_TK = random(4, WIDTH), choices(4, 3)
    weight = quantised(weight_of(WEIGHTS[6], 72, experts=EXPERTS), kind)
    tiled_RU, single_RU = (torch.full((12, weight.units), UNTOUCHED) for _ in range(2))
    gemm(x_TD, weight, tiled_RU, pair_tiles(expert_TK, 16), 3, small(), at_once)
    gemm(x_TD, weight, single_RU, PairTiles(expert_TK.flatten().int(), None, 12), 3, small(), at_once)
    assert torch.equal(tiled_RU, single_RU)
    for pair, expert in enumerate(expert_TK.flatten().tolist()):
        if expert == EXPERTS:
            assert (tiled_RU[pair] == UNTOUCHED).all()
        else:
            close(tiled_RU[pair, None], expected(x_TD[pair // 3, None], weight, expert))


@pytest.mark.parametrize("kind", KINDS)
def test_an_inner_dimension_of_8_bits_that_is_no_multiple_of_a_step(kind: Quantize) -> None:
    x_TD, weight = random(3, 76), quantised(Weight(random(1, 70, 76, seed=2)), kind)
    out_TU = torch.full((3, weight.units), torch.nan)
    gemm(x_TD, weight, out_TU, tile=Tile(64, 16, inner=64))
    torch.testing.assert_close(out_TU.double(), expected(x_TD, weight), atol=1e-4, rtol=1e-4)
