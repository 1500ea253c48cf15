"""Queries and cached keys and values against the decoder's own attention module, for what the families do to heads."""

import pytest
import torch
from torch import Tensor, nn

from model.attention.attention import SelfAttention, _unit_norm
from model.attention.rope import rotary_tables, rotate
from model.backends.cuda.kernels.rotary import HeadNorms, rotary
from model.shapes.attention import Attention
from model.shapes.rope import Rope
from tests.model.tiny import llama_like, randomise, topk

TOKENS, SLOTS, WIDTH = 5, 80, 12
UNTOUCHED = -77.0

SHAPES = {
    "qwen3_moe": {"rope": Rope(WIDTH), "qk_norm": "head"},
    "olmoe": {"rope": Rope(WIDTH), "qk_norm": "full", "clip": 1.0},
    "clipped": {"rope": Rope(WIDTH), "clip": 0.5},
    "glm4_moe": {"rope": Rope(6), "qk_norm": "head"},
    "clipped, then normed": {"rope": Rope(6), "qk_norm": "head", "clip": 1.0},
    "llama4": {"rope": Rope(WIDTH, interleaved=True), "qk_norm": "unit"},
    "llama4 without positions": {"floor_scale": 8.0, "attn_scale": 0.1},
    "qwen3_next": {"rope": Rope(6), "qk_norm": "head", "gated": True},
    "gpt2": {},
}


def attention(options: dict) -> SelfAttention:
    """Its projection is left out: it is given queries, keys and values."""
    shape = Attention(heads=4, kv_heads=2, head_width=WIDTH, **options)
    module = SelfAttention(shape, llama_like(topk()))
    randomise(module)
    module.qkv = nn.Identity()
    return module.requires_grad_(False)


def norms_of(module: SelfAttention) -> HeadNorms:
    kind = module.shape.qk_norm
    if kind in ("none", "unit"):
        return HeadNorms(eps=module._eps, unit=kind == "unit")
    return HeadNorms(module.q_norm.weight, module.k_norm.weight, module._eps, full=kind == "full")


def expected(module: SelfAttention, qkv_TX: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q_THC, k_TGC, v_TGC, _ = module.project(qkv_TX)
    rope = module.shape.rope
    if rope is not None:
        tables = rotary_tables(positions_T, rope)
        q_THC, k_TGC = rotate(q_THC, tables, rope), rotate(k_TGC, tables, rope)
    if module.shape.qk_norm == "unit":
        q_THC, k_TGC = _unit_norm(q_THC, module._eps), _unit_norm(k_TGC, module._eps)
    if module.shape.floor_scale is not None:
        steps_T = ((positions_T + 1) // int(module.shape.floor_scale)).double()
        q_THC = (q_THC * (1 + module.shape.attn_scale * steps_T.log1p())[:, None, None]).float()
    return q_THC, k_TGC, v_TGC


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_as_the_decoder_has_them(options: dict, dtype: torch.dtype) -> None:
    module, generator = attention(options), torch.Generator().manual_seed(0)
    qkv_TX = torch.randn(TOKENS, sum(module.sizes), generator=generator).to(dtype)
    positions_T, slots_T = torch.tensor([7, 0, 63, 64, 500]), torch.tensor([71, 3, 0, 79, -1])
    q_THC = torch.full((TOKENS, 4, WIDTH), torch.nan, dtype=dtype)
    cache_PSGC = torch.full((2, SLOTS, 2, WIDTH), UNTOUCHED, dtype=dtype)
    rope = module.shape.rope
    tables = None if rope is None else rotary_tables(positions_T, rope)
    rotary(qkv_TX, module.shape, norms_of(module), tables, slots_T, q_THC, cache_PSGC, positions_T)
    wanted = expected(module, qkv_TX.float(), positions_T)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for found, want in ((q_THC, wanted[0]), (cache_PSGC[0, slots_T[:4]], wanted[1][:4])):
        torch.testing.assert_close(found.float(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(cache_PSGC[1, slots_T[:4]].float(), wanted[2][:4], atol=1e-6, rtol=1e-6)
    others = [slot for slot in range(SLOTS) if slot not in slots_T.tolist()]
    assert (cache_PSGC[:, others] == UNTOUCHED).all()  # also the last slot's neighbours: -1 is no slot


def test_what_has_no_kernel_is_named() -> None:
    module, given = attention({}), (None, torch.zeros(1), torch.zeros(1, 4, WIDTH))
    cache_PSGC = torch.zeros(2, SLOTS, 2, WIDTH)
    gated = Attention(4, 2, WIDTH, gated=True)
    with pytest.raises(NotImplementedError, match="a norm over all heads beside gates"):
        rotary(torch.zeros(1, 144), gated, HeadNorms(full=True), *given, cache_PSGC)
    with pytest.raises(ValueError, match="queries that grow with their position need positions"):
        rotary(torch.zeros(1, 96), Attention(4, 2, WIDTH, floor_scale=8.0), HeadNorms(), *given, cache_PSGC)
    with pytest.raises(ValueError, match=r"the cache must be \[2, 80, 2, 12\], got \[2, 80, 4, 12\]"):
        rotary(torch.zeros(1, 96), module.shape, HeadNorms(), *given, torch.zeros(2, SLOTS, 4, WIDTH))
