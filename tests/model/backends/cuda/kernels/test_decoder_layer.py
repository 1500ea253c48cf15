"""A decoder's layers from kernels, over pages: the torch decoder's hidden states, and the same bits in any cut."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention.rope import rotary_tables
from model.backends.cuda import places
from model.backends.cuda.attention import attention_layer, attention_refusal
from model.backends.cuda.kernels import attend as kernels
from model.backends.cuda.kernels.norm import Norm, residual_norm
from model.backends.cuda.layer import moe_layer
from model.backends.torch.attend import WholeAttend
from model.batch import Cache, Pages, Span
from model.decoder import Decoder
from model.shapes.mixtures import Router
from tests.model.tiny import budget_rows, decoder, llama_like, topk, whole_batch

BLOCKS, PAGE = 6, 16
HEADS = {"heads": 4, "kv_heads": 2, "head_width": 12}


@pytest.fixture(autouse=True)
def small_pages(poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences cross a page, and a page is a segment. Nothing may be read that was not written."""
    monkeypatch.setattr(kernels, "PAGE", PAGE)
    monkeypatch.setattr(places, "PAGE", PAGE)
    monkeypatch.setattr(kernels, "SEGMENT", PAGE)


def flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([*chain.from_iterable(rows)])


class Layers:
    """Hidden states of a decoder's tokens, computed by kernels, and the pages of its sequences."""

    def __init__(self, model: Decoder) -> None:
        config = model.config
        self.model = model
        self.attention = [attention_layer(layer.attention, config.norm_eps) for layer in model.layers]
        self.mixtures = [moe_layer(layer.ffn) for layer in model.layers]
        norms = [norm for layer in model.layers for norm in (layer.attention_norm, layer.ffn_norm)]
        self.norms = [Norm(norm.weight, norm.eps) for norm in (*norms, model.norm)]
        shape = (2, BLOCKS * PAGE, HEADS["kv_heads"], HEADS["head_width"])
        self.cache = Cache(PAGE, [torch.full(shape, torch.nan) for _ in model.layers])

    def run(self, ids: list[list[int]], counts: list[list[int]], done: list[int], tables: list[list[int]]) -> Tensor:
        """Final normed hidden states of the new tokens of several sequences, after so many done before."""
        spans, first = [], 0
        for new, before in zip(ids, done, strict=True):
            spans.append(Span(first, len(new), before + len(new)))
            first += len(new)
        spans_B3 = torch.tensor([(span.first, span.rows, span.context) for span in spans])
        pages = Pages(self.cache, torch.tensor(tables), spans_B3)
        config = self.model.config
        step = places.places_of(pages, spans, HEADS["heads"] // HEADS["kv_heads"])
        positions_T = torch.cat([torch.arange(span.context - span.rows, span.context) for span in spans])
        turned = rotary_tables(positions_T, config.attention[0].rope)
        x_TD = self.model.embed(flat(ids)).clone()
        counts_T, normed_TD = flat(counts), torch.full_like(x_TD, torch.nan)
        residual_norm(x_TD, self.norms[0], normed_TD)
        for number in range(len(self.mixtures)):
            cache, (before, after) = self.cache.layers[number], self.norms[2 * number + 1 : 2 * number + 3]
            given = (normed_TD, turned, step, cache, x_TD, before, normed_TD, config.residual_scale)
            self.attention[number](*given, positions_T=positions_T)
            k_max = int(counts_T.max())
            self.mixtures[number](normed_TD, counts_T, k_max, x_TD, after, normed_TD, config.residual_scale)
        return normed_TD


MIXTURE = topk(experts=8, router=Router(normalise=True))
IDS, COUNTS = [(7 * at) % 61 for at in range(21)], [1 + at % 8 for at in range(21)]
OTHER = [5, 9, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "full"},
        {"qk_norm": "head", "window": 9, "bias": True, "sinks": True},
        {"qk_norm": "head", "gated": True},
        {"qk_norm": "unit", "chunk": 9, "floor_scale": 5.0, "attn_scale": 0.1},
    ],
)
def test_hidden_states_are_those_of_the_torch_decoder(changes: dict[str, Any]) -> None:
    """Two sequences side by side; one crosses a page."""
    model = decoder(llama_like(MIXTURE, residual_scale=0.5, **HEADS, **changes))
    found_TD = Layers(model).run([IDS, OTHER], [COUNTS, [8, 1, 3]], [0, 0], [[4, 1], [2, 0]])
    for ids, counts, part_TD in ((IDS, COUNTS, found_TD[:21]), (OTHER, [8, 1, 3], found_TD[21:])):
        batch = replace(whole_batch(ids, [1]), budget=budget_rows(torch.tensor([counts])))
        wanted_TD = model.hidden(batch, WholeAttend(len(ids)))
        torch.testing.assert_close(part_TD, wanted_TD, atol=5e-5, rtol=5e-5)


def test_bits_do_not_depend_on_chunks_or_neighbours(chains: None) -> None:
    """21 tokens at once; then 14, five beside another sequence, and two one by one."""
    model = decoder(llama_like(MIXTURE, MIXTURE, qk_norm="head", **HEADS))
    whole_TD = Layers(model).run([IDS], [COUNTS], [0], [[4, 1]])
    cut = Layers(model)
    parts = [cut.run([IDS[:14]], [COUNTS[:14]], [0], [[0, 3]])]
    parts.append(cut.run([OTHER, IDS[14:19]], [[8, 8, 8], COUNTS[14:19]], [0, 14], [[5, 0], [0, 3]])[3:])
    for at in (19, 20):
        parts.append(cut.run([IDS[at : at + 1]], [COUNTS[at : at + 1]], [at], [[0, 3]]))
    assert torch.equal(torch.cat(parts), whole_TD)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"causal": False}, "attention to later tokens"),
        ({"gated": True, "qk_norm": "full"}, "a norm over all heads beside gates"),
        ({"head_width": 258}, "heads of more than 256 elements have no GPU kernel, these have 258"),
    ],
)
def test_what_has_no_kernel_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    model = decoder(llama_like(MIXTURE, **HEADS | changes))
    assert reason in attention_refusal(model.config.attention[0])
    with pytest.raises(ValueError, match=reason):
        attention_layer(model.layers[0].attention, 1e-5)


def test_blocks_of_another_size_are_an_error() -> None:
    pages = Pages(Cache(4, []), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[0, 1, 1]]))
    with pytest.raises(ValueError, match="blocks of 16 tokens, not of 4"):
        places.places_of(pages, pages.spans, shared=2)


def test_queries_are_cut_into_tiles_of_one_sequence() -> None:
    spans = [Span(0, 1, 9), Span(1, 5, 5), Span(6, 2, 40)]
    tiles = places.query_tiles(spans, 2, torch.device("cpu"))
    assert tiles.rows == 2
    assert tiles.sequence_N.tolist() == [0, 1, 1, 1, 2] and tiles.first_N.tolist() == [0, 0, 2, 4, 0]
    assert places.query_tiles(spans[:1], 2, torch.device("cpu")).rows == 1
