"""A layer of latent attention from kernels, over pages: the torch module's output, and the same bits in any cut."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.attention.mla import MLAAttention
from model.attention.rope import rotary_tables
from model.backends.cuda import places
from model.backends.cuda.kernels import attend, latent_attend
from model.backends.cuda.kernels.norm import Norm, residual_norm
from model.backends.cuda.latent import latent_layer, latent_refusal
from model.backends.cuda.quantise import AS_LOADED, Precision
from model.backends.torch.attend import WholeAttend
from model.batch import Cache, Span
from model.shapes.attention import MLA
from model.shapes.rope import Rope
from tests.model.tiny import llama_like, randomise, topk, use

WIDTH, BLOCKS, PAGE, HEADS = 24, 6, 16, 3

SHAPES = {
    "deepseek_v2_lite": MLA(HEADS, None, 20, 10, Rope(6), 8),
    "deepseek_v3": MLA(HEADS, 14, 20, 10, Rope(6, interleaved=True), 8, bias=True, scale=0.4),
}


@pytest.fixture(autouse=True)
def small_pages(poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences cross a page, and a page is a segment. Nothing may be read that was not written."""
    for module in (attend, places):
        monkeypatch.setattr(module, "PAGE", PAGE)
    monkeypatch.setattr(latent_attend, "SEGMENT", PAGE)


def attention(shape: MLA) -> MLAAttention:
    module = MLAAttention(shape, llama_like(topk(), width=WIDTH))
    randomise(module)
    return module.requires_grad_(False)


def tokens(count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


class Paged:
    """A layer, and the pages of its sequences."""

    def __init__(
        self, module: MLAAttention, dtype: torch.dtype = torch.float32, precision: Precision = AS_LOADED
    ) -> None:
        self.layer, self.dtype = latent_layer(module.to(dtype), precision), dtype
        width = module.shape.rank + module.shape.rope.width
        self.cache = Cache(PAGE, [torch.full((1, BLOCKS * PAGE, 1, width), torch.nan, dtype=dtype)])

    def run(self, new: list[Tensor], done: list[int], tables: list[list[int]]) -> Tensor:
        """What the layer adds to a residual of zeros for the new tokens of several sequences."""
        spans, first = [], 0
        for x_TD, before in zip(new, done, strict=True):
            spans.append(Span(first, len(x_TD), before + len(x_TD)))
            first += len(x_TD)
        spans_B3 = torch.tensor([(span.first, span.rows, span.context) for span in spans])
        tables_BP, longest = torch.tensor(tables), int(spans_B3[:, 2].max())
        tiles = places.query_tiles(spans_B3, attend.MAX_QUERIES // HEADS)
        step = places.Places(tables_BP, spans_B3, places.slots_of(tables_BP, spans_B3), tiles, longest)
        positions_T = torch.cat([torch.arange(span.context - span.rows, span.context) for span in spans])
        turned = rotary_tables(positions_T, self.layer.shape.rope)
        x_TD, residual_TD = torch.cat(new).to(self.dtype), torch.zeros(first, WIDTH)
        out_TD, norm = x_TD.new_empty(x_TD.shape), Norm(torch.ones(WIDTH), 1e-5)
        self.layer(x_TD, turned, step, self.cache.layers[0], residual_TD, norm, out_TD, 0.5)
        again_TD = x_TD.new_empty(x_TD.shape)
        residual_norm(residual_TD, norm, again_TD)
        assert torch.equal(out_TD, again_TD)
        return residual_TD


def expected(module: MLAAttention, x_TD: Tensor) -> Tensor:
    """The same of one whole sequence by the torch module."""
    step = use([1] * len(x_TD))
    turned = {module.shape.rope: rotary_tables(step.positions_T, module.shape.rope)}
    return 0.5 * module(x_TD, replace(step, past=WholeAttend(len(x_TD)), rotary=turned))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_is_that_of_the_torch_module(shape: MLA) -> None:
    """Two sequences side by side; one crosses a page."""
    module, parts = attention(shape), [tokens(21), tokens(3, seed=4)]
    found_TD = Paged(module).run(parts, [0, 0], [[4, 1], [2, 0]])
    wanted_TD = torch.cat([expected(module, x_TD) for x_TD in parts])
    torch.testing.assert_close(found_TD, wanted_TD, atol=2e-5, rtol=2e-5)


def test_half_precision() -> None:
    module = attention(SHAPES["deepseek_v3"])
    wanted_TD = expected(module, tokens(5))
    found_TD = Paged(module, torch.float16).run([tokens(5)], [0], [[4]])
    torch.testing.assert_close(found_TD, wanted_TD, atol=4e-3, rtol=4e-3)


def test_bits_do_not_depend_on_chunks_or_neighbours(chains: None) -> None:
    """21 tokens at once; then 14, six beside another sequence, and one alone."""
    module, x_TD = attention(SHAPES["deepseek_v3"]), tokens(21)
    whole_TD = Paged(module).run([x_TD], [0], [[4, 1]])
    cut = Paged(module)
    parts = [cut.run([x_TD[:14]], [0], [[0, 3]])]
    parts.append(cut.run([tokens(3, seed=4), x_TD[14:20]], [0, 14], [[5, 0], [0, 3]])[3:])
    parts.append(cut.run([x_TD[20:]], [20], [[0, 3]]))
    assert torch.equal(torch.cat(parts), whole_TD)


def test_matrices_of_8_bits() -> None:
    """As the torch module with their values; the products per head keep their own."""
    module, precision = attention(MLA(HEADS, 16, 20, 10, Rope(6), 8)), Precision("int8-weights", experts_only=False)
    paged = Paged(module, precision=precision)
    for name in ("query_down", "query", "down", "out"):
        weight = getattr(paged.layer, name)
        assert weight.packed == "int8"
        getattr(module, name).weight.copy_((weight.values_EOD * weight.scale_EO[..., None])[0])
    found_TD = paged.run([tokens(5)], [0], [[4]])
    torch.testing.assert_close(found_TD, expected(module, tokens(5)), atol=2e-5, rtol=2e-5)


def test_latents_that_are_too_wide_are_refused() -> None:
    shape = replace(SHAPES["deepseek_v3"], rank=513)
    assert latent_refusal(SHAPES["deepseek_v3"]) is None
    assert "more than 512 elements have no GPU kernel, these have 513" in latent_refusal(shape)
    with pytest.raises(ValueError, match="these have 513"):
        latent_layer(attention(shape))
