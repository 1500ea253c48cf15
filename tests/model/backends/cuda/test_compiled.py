"""Every kernel compiles for sm_90 at the sizes of real models: without spilling, within a program's shared memory, with
loads of 16 bytes, and with the warp-group matrix instruction where it is a matrix product."""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets kernels in this process", allow_module_level=True)

from model.backends.cuda.kernels.align import align, empty_tiles
from model.backends.cuda.kernels.attend import QueryTiles, attend
from model.backends.cuda.kernels.combine import combine
from model.backends.cuda.kernels.convolution import convolve
from model.backends.cuda.kernels.delta_rule import delta_rule
from model.backends.cuda.kernels.draws import draw
from model.backends.cuda.kernels.gated_norm import gated_norm
from model.backends.cuda.kernels.gemm import gemm
from model.backends.cuda.kernels.grouped import kept_steps, masked_down, masked_up
from model.backends.cuda.kernels.latent_attend import attend_latent
from model.backends.cuda.kernels.latent_rotary import latent_rotary
from model.backends.cuda.kernels.masks import keep
from model.backends.cuda.kernels.norm import Norm, residual_norm
from model.backends.cuda.kernels.operands import TILES, PairTiles, Tile, Weight
from model.backends.cuda.kernels.per_head import per_head
from model.backends.cuda.kernels.repair import Repair
from model.backends.cuda.kernels.rotary import HeadNorms, rotary
from model.backends.cuda.kernels.route import TokenRules, route
from model.backends.cuda.kernels.sparse_mixer import sparse_mixer
from model.backends.cuda.kernels.token_draws import draw_tokens
from model.backends.cuda.kernels.tokens import best, masked
from model.backends.cuda.kernels.weighed import weighed
from model.moe.repair import RepairTables
from model.sampling import Draws, Masks
from model.shapes.attention import MLA, Attention, GatedDeltaNet
from model.shapes.mixtures import Infinity, Router
from model.shapes.rope import Rope
from model.step import MaskSpec
from tests.model.backends.cuda.compiled import SHARED, Compiled, record

WIDTH, EXPERTS, EXPERT_WIDTH, K_MAX = 2048, 64, 1024, 8  # of OLMoE-1B-7B


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int32)


def floats(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.float32)


def longs(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def repair_of(width: int) -> Repair:
    return Repair(RepairTables(floats(K_MAX + 1, width), floats(K_MAX + 1, width)), longs(9), ints(9))


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


EIGHT_BITS = [
    *((torch.float8_e4m3fn, rows, False) for rows in TILES),
    (torch.float8_e4m3fn, 16, True),
    (torch.int8, 128, False),
    (torch.int8, 64, True),
]


@pytest.mark.parametrize(("dtype", "rows", "split"), EIGHT_BITS)
def test_gemm_of_8_bits(dtype: torch.dtype, rows: int, split: bool) -> None:
    """As above; no load of weights is narrower than 16 bytes."""
    tile, gated = TILES[rows], not split
    values, scales = empty(EXPERTS, 2048, WIDTH, dtype=dtype), floats(EXPERTS, 2048)
    weight = Weight(values, activation="silu" if gated else "none", gated=gated, scale_EO=scales)
    pairs = PairTiles(ints(100), ints(100, tile.rows), 9 * K_MAX)
    with record() as found:
        gemm(empty(9, WIDTH), weight, empty(9 * K_MAX, weight.units), pairs, K_MAX, tile, side_by_side=split)
    assert found[0].tensor_cores and not found[0].narrow_copies
    for made in found:
        fits(made)


DEEPSEEK_ROUTER = Router(
    "sigmoid", normalise=True, selection_bias=True, groups=8, kept_groups=4, group_score="top2", eps=1e-20
)


@pytest.mark.parametrize(
    ("router", "experts"), [(Router(), EXPERTS), (Router(normalise=True), 128), (DEEPSEEK_ROUTER, 256)]
)
def test_route(router: Router, experts: int) -> None:
    bias_E = empty(experts) if router.selection_bias else None
    logits_TE, counts_T = floats(9, experts), empty(9, dtype=torch.int64)
    rules = TokenRules(ints(9), floats(9), floats(9), trained=8, ranks=16)
    with record() as found:
        for of_requests in (None, rules, replace(rules, reuse_T=ints(9), most_reuse=4)):
            columns = K_MAX if of_requests is None else K_MAX + of_requests.most_reuse
            route(logits_TE, counts_T, router, ints(9, columns), floats(9, columns), None, bias_E, of_requests)
    assert [made.stack for made in found] == [0, 0, 0, 0]  # reuse takes two launches


def test_sparse_mixer() -> None:
    """Of Phi-3.5-MoE."""
    with record() as found:
        sparse_mixer(floats(9, 16), longs(9), 0.01, ints(9, 2), floats(9, 2))
    assert [made.stack for made in found] == [0]


def test_weighed() -> None:
    """Of Llama 4 Scout."""
    with record() as found:
        weighed(empty(9, 5120), ints(9, 2), floats(9, 2), 16, empty(18, 5120))
    for made in found:
        fits(made)


def test_align() -> None:
    expert_TK = ints(9, K_MAX)
    with record() as found:
        align(expert_TK, empty_tiles(9 * K_MAX, EXPERTS, 16, expert_TK), ints(EXPERTS))
    assert [made.stack for made in found] == [0]


@pytest.mark.parametrize("width", [WIDTH, 7168])
def test_combine(width: int) -> None:
    norm, routed = Norm(empty(width), 1e-6), (ints(9, K_MAX), floats(9, K_MAX))
    repair, parts = repair_of(width), (floats(9, width), norm, empty(9, width), empty(9, width))
    with record() as found:
        combine(floats(9 * K_MAX, width), *routed, EXPERTS, *parts)
        combine(floats(9 * K_MAX, width), *routed, EXPERTS, *parts, repair=repair)
    for made in found:
        fits(made)


@pytest.mark.parametrize("layer", [False, True])
def test_norm(layer: bool) -> None:
    norm = Norm(empty(WIDTH), 1e-6, empty(WIDTH) if layer else None, layer=layer)
    with record() as found:
        residual_norm(floats(9, WIDTH), norm, empty(9, WIDTH), empty(9, WIDTH))
        residual_norm(floats(9, WIDTH), norm, empty(9, WIDTH), empty(9, WIDTH), 1.0, repair_of(WIDTH))
    for made in found:
        fits(made)


OLMOE = Attention(16, 16, 128, Rope(128), qk_norm="full")
QWEN = Attention(32, 4, 128, Rope(128), qk_norm="head")
GPT_OSS = Attention(64, 8, 64, Rope(64), window=128, sinks=True)
LLAMA4 = Attention(
    40, 8, 128, Rope(128, interleaved=True), qk_norm="unit", chunk=8192, floor_scale=8192.0, attn_scale=0.1
)
QWEN_NEXT = Attention(16, 2, 256, Rope(64), qk_norm="head", gated=True)
SHAPES = [OLMOE, QWEN, GPT_OSS, LLAMA4, QWEN_NEXT]


@pytest.mark.parametrize("shape", SHAPES)
def test_rotary(shape: Attention) -> None:
    heads = shape.heads * (1 + shape.gated) + 2 * shape.kv_heads
    width = 1 if shape.qk_norm == "head" else shape.heads
    has_weights = shape.qk_norm in ("head", "full")
    norms = HeadNorms(*((empty(width * shape.head_width),) * 2 if has_weights else ()), full=width > 1)
    tables = floats(9, 1, shape.rope.width), floats(9, 1, shape.rope.width)
    places = longs(9), empty(9, shape.heads, shape.head_width), empty(2, 6400, shape.kv_heads, shape.head_width)
    with record() as found:
        rotary(empty(9, heads * shape.head_width), shape, norms, tables, *places, positions_T=longs(9))
    assert [made.stack for made in found] == [0]


@pytest.mark.parametrize(
    ("shape", "rows", "split"),
    [
        (OLMOE, 1, True),
        (OLMOE, 32, False),
        (QWEN, 1, True),
        (QWEN, 4, False),
        (GPT_OSS, 4, False),
        (LLAMA4, 6, False),
        (QWEN_NEXT, 1, True),
        (QWEN_NEXT, 4, False),
    ],
)
def test_attend(shape: Attention, rows: int, split: bool) -> None:
    cache_PSGC = empty(2, 6400, shape.kv_heads, shape.head_width)
    spec = MaskSpec(0.1, shape.window, shape.chunk, empty(shape.heads) if shape.sinks else None)
    gate_THC = empty(9, shape.heads, 2 * shape.head_width)[..., shape.head_width :] if shape.gated else None
    q_THC = empty(9, shape.heads, shape.head_width)
    tiles = QueryTiles(ints(9), ints(9), rows)
    with record() as found:
        places = (longs(9, 100), longs(9, 3), tiles, 6400)
        attend(q_THC, cache_PSGC, *places, spec, q_THC, side_by_side=split, gate_THC=gate_THC)
    assert [made.name for made in found] == ["_attend", "merge"][: 1 + split]
    fits(found[0])
    assert found[0].tensor_cores and all(made.stack == 0 for made in found)


DEEPSEEK_V3 = MLA(128, 1536, 512, 128, Rope(64, interleaved=True), 128)


@pytest.mark.parametrize("split", [False, True])
def test_attend_latent(split: bool) -> None:
    shape = DEEPSEEK_V3
    q_THC, out_THR = empty(9, shape.heads, 576), empty(9, shape.heads, shape.rank)
    tiles = QueryTiles(ints(9), ints(9), 1)
    with record() as found:
        attend_latent(q_THC, empty(1, 6400, 1, 576), longs(9, 100), longs(9, 3), tiles, 6400, 0.1, out_THR, split)
    assert [made.name for made in found] == ["_attend_latent", "merge"][: 1 + split]
    fits(found[0])
    assert found[0].tensor_cores and all(made.stack == 0 for made in found)


@pytest.mark.parametrize("tile", TILES.values())
def test_per_head(tile: Tile) -> None:
    """Into the space of the latents, whose weights lie across, and out of it."""
    shape = DEEPSEEK_V3
    keys_HNR, values_HVR = empty(shape.heads, 256, shape.rank).split((shape.plain_width, shape.value_width), 1)
    q_THX, q_THC = empty(9, shape.heads, 192), empty(9, shape.heads, 576)
    with record() as found:
        per_head(q_THX[..., : shape.plain_width], keys_HNR.mT, q_THC[..., : shape.rank], tile)
        per_head(empty(9, shape.heads, shape.rank), values_HVR, empty(9, shape.heads, shape.value_width), tile)
    for made in found:
        fits(made)
        assert made.tensor_cores


def test_latent_rotary() -> None:
    shape, turned = DEEPSEEK_V3, (floats(9, 1, 64), floats(9, 1, 64))
    places = longs(9), empty(9, shape.heads, 576), empty(1, 6400, 1, 576)
    norm = Norm(empty(shape.rank), 1e-6)
    with record() as found:
        latent_rotary(empty(9, shape.heads * 192), empty(9, 576), shape, norm, turned, *places)
    assert [made.stack for made in found] == [0]


QWEN_NEXT_STATES = GatedDeltaNet(16, 32, 128, 128, 4)


def test_gated_delta_net() -> None:
    shape = QWEN_NEXT_STATES
    sequences = floats(5, shape.memory.size), longs(3, 3), longs(3)
    projected_TX, convolved_TC, y_THV = empty(9, 12288), floats(9, shape.channels), floats(9, 32, 128)
    with record() as found:
        convolve(projected_TX, empty(shape.channels, 4), shape, *sequences, convolved_TC)
        delta_rule(convolved_TC, empty(9, 64), empty(32), empty(32), shape, *sequences, y_THV)
        gated_norm(y_THV, projected_TX, Norm(empty(128), 1e-6), shape, empty(9, 32, 128))
    assert [made.stack for made in found] == [0, 0, 0]
    assert found[1].wide_loads  # of the state, which is what a step reads


BUNDLED = Infinity(
    6144, 32, 1 / 32, 4, 16, block=64, activation="gelu", draws="points", replacement=False, aggregate="norm"
)
PAPER = Infinity(6144, 32, 0.25, 4, 16, activation="silu", draws="antithetic", sigma_link="softplus")


@pytest.mark.parametrize("shape", [BUNDLED, PAPER])
@pytest.mark.parametrize("layer", [1, 3])
def test_draws_and_masks(shape: Infinity, layer: int) -> None:
    counts_T = longs(9)
    with record() as found:
        draw(floats(9, 64), longs(9), longs(9), counts_T, layer, shape, floats(65536), floats(72, 32))
        keep(floats(72, shape.blocks), counts_T, shape, floats(9, shape.blocks))
    assert [made.stack for made in found] == [0, 0]


@pytest.mark.parametrize("shape", [BUNDLED, PAPER])
@pytest.mark.parametrize("tile", [TILES[16], TILES[128]])
def test_products_under_a_mask(shape: Infinity, tile: Tile) -> None:
    mask_TE, h_TF = floats(9, shape.blocks), empty(9, shape.units)
    with record() as found:
        steps = kept_steps(mask_TE, shape.units, tile.rows)
        masked_up(empty(9, 768), empty(shape.units, 768), mask_TE, steps, shape.activation, tile, h_TF)
        masked_down(h_TF, empty(768, shape.units), mask_TE, steps, tile, floats(9, 768))
    assert [made.stack for made in found] == [0, 0, 0]
    for made in found[1:]:
        fits(made)
        assert made.tensor_cores


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.redundant)])
def test_tokens(dtype: torch.dtype) -> None:
    """Of the vocabulary of Qwen3."""
    logits_RV, token_R = empty(9, 151_936, dtype=dtype), empty(9, dtype=torch.int64)
    masks = Masks(ints(2, 4748), token_R)
    columns = [empty(9, dtype=torch.float64) for _ in range(5)]
    with record() as found:
        best(logits_RV, logits_RV)
        masked(logits_RV, masks, logits_RV)
        for cuts in (False, True):
            draw_tokens(logits_RV, floats(9), Draws(*columns, cuts=cuts), token_R)
    assert [made.stack for made in found] == [0] * len(found)
