"""Attention of parts of a step gives what its definition gives, over pages and without them: one way or both, with a
bias by distance, in tiles of any size.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.backends.torch.attend import PagedAttend, WholeAttend
from model.batch import Cache, Pages, Part
from model.step import DistanceBias, MaskSpec
from tests.model.backends.torch.test_tiles import small_tiles

HEADS, GROUPS, WIDTH, BLOCK, LONGEST = 4, 2, 8, 4, 40


def random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def pages(sequences: int) -> Pages:
    """Of sequences whose blocks are in random order, all filled."""
    per = LONGEST // BLOCK
    cache = Cache(BLOCK, [random(2, sequences * LONGEST, GROUPS, WIDTH)])
    spans_B3 = torch.tensor([[number, 1, LONGEST] for number in range(sequences)])
    return Pages(cache, torch.randperm(sequences * per).view(sequences, per), spans_B3)


def expected(parts: list[Part], q_THC: Tensor, keys: list[Tensor], values: list[Tensor], spec: MaskSpec) -> Tensor:
    """Query by query, in float64, from each part's keys [S, G, C] from position 0 on."""
    rows, row = [], 0
    for part, k_SGC, v_SGC in zip(parts, keys, values, strict=True):
        for position in range(part.query, part.query + part.queries):
            end = min(part.end, position + 1) if spec.causal else part.end
            k_HSC, v_HSC = (
                x[part.first : end].double().transpose(0, 1).repeat_interleave(HEADS // GROUPS, 0)
                for x in (k_SGC, v_SGC)
            )
            score_HS = (k_HSC @ q_THC[row].double()[:, :, None])[..., 0] * spec.scale
            if spec.bias is not None:
                for column, key in enumerate(range(part.first, end)):
                    place = min(max(position - key - spec.bias.least, 0), spec.bias.bias_HX.shape[1] - 1)
                    score_HS[:, column] += spec.bias.bias_HX[:, place].double()
            rows.append((score_HS.softmax(-1)[:, None] @ v_HSC)[:, 0])
            row += 1
    return torch.stack(rows).float()


@st.composite
def part(draw: st.DrawFn, number: int) -> Part:
    """Any queries, any visible positions; new keys are some of them."""
    first = draw(st.integers(0, LONGEST - 1))
    end = draw(st.integers(first + 1, LONGEST))
    query = draw(st.integers(first, LONGEST - 1))  # one way, a query sees at least one key
    queries = draw(st.one_of(st.just(1), st.integers(1, LONGEST - query)))
    key = draw(st.integers(0, LONGEST - 1))
    return Part(number, queries, query, draw(st.integers(0, LONGEST - key)), key, first, end)


@given(st.data(), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_over_pages(data: st.DataObject, sequences: int, causal: bool, biased: bool, small: bool) -> None:
    torch.manual_seed(0)
    parts = [data.draw(part(number)) for number in range(sequences)]
    past = pages(sequences)
    rows, new = sum(p.queries for p in parts), sum(p.keys for p in parts)
    q_THC, k_TGC, v_TGC = random(rows, HEADS, WIDTH), random(new, GROUPS, WIDTH), random(new, GROUPS, WIDTH)
    bias = DistanceBias(random(HEADS, 12), -5) if biased else None
    spec = MaskSpec(0.4, causal=causal, bias=bias)
    own = PagedAttend(past, torch.device("cpu")).part(parts)
    if small:
        with small_tiles():
            found = own.attend(0, q_THC, k_TGC, v_TGC, spec)
    else:
        found = own.attend(0, q_THC, k_TGC, v_TGC, spec)
    position_S = torch.arange(LONGEST)
    slots = [past.tables_BP[p.sequence][position_S // BLOCK] * BLOCK + position_S % BLOCK for p in parts]
    kept_PSGC = past.cache.layers[0]
    for p, k_SGC, v_SGC in zip(
        parts, k_TGC.split([p.keys for p in parts]), v_TGC.split([p.keys for p in parts]), strict=True
    ):
        assert torch.equal(kept_PSGC[:, slots[p.sequence][p.key : p.key + p.keys]], torch.stack([k_SGC, v_SGC]))
    wanted = expected(parts, q_THC, [kept_PSGC[0, s] for s in slots], [kept_PSGC[1, s] for s in slots], spec)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_without_pages_the_keys_are_those_of_the_step(causal: bool) -> None:
    torch.manual_seed(1)
    parts = [Part(0, 3, 5, 6, 2, 2, 8), Part(1, 1, 0, 4, 0, 0, 4), Part(2, 7, 0, 7, 0, 0, 7)]
    q_THC, k_TGC, v_TGC = random(11, HEADS, WIDTH), random(17, GROUPS, WIDTH), random(17, GROUPS, WIDTH)
    spec = MaskSpec(0.4, causal=causal, bias=DistanceBias(random(HEADS, 5), 0))
    nothing = torch.full((2, GROUPS, WIDTH), torch.nan)  # positions before the first new key
    keys, values = (
        [torch.cat([nothing, x[:6]]), x[6:10], x[10:]]  # the first part's keys begin at position 2
        for x in (k_TGC, v_TGC)
    )
    wanted = expected(parts, q_THC, keys, values, spec)
    for past in (WholeAttend(1), PagedAttend(pages(3), torch.device("cpu"))):
        found = past.part(parts).attend(-1, q_THC, k_TGC, v_TGC, spec)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert [span.first for span in WholeAttend(1).part(parts).spans(11)] == [0, 3, 4]
    turned = replace(spec, bias=None)
    assert not torch.allclose(WholeAttend(1).part(parts).attend(-1, q_THC, k_TGC, v_TGC, turned), wanted)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("small", [True, False])
def test_parts_of_one_shape_are_computed_together(causal: bool, small: bool) -> None:
    """Equally many rows that see equally many positions, from other places."""
    torch.manual_seed(2)
    parts = [Part(0, 9, 20, 9, 20, 4, 29), Part(1, 9, 30, 9, 30, 14, 39), Part(2, 9, 8, 0, 0, 0, 25)]
    past = pages(3)
    q_THC, k_TGC, v_TGC = random(27, HEADS, WIDTH), random(18, GROUPS, WIDTH), random(18, GROUPS, WIDTH)
    spec = MaskSpec(0.4, causal=causal, bias=DistanceBias(random(HEADS, 12), -5))
    with small_tiles() if small else nullcontext():
        found = PagedAttend(past, torch.device("cpu")).part(parts).attend(0, q_THC, k_TGC, v_TGC, spec)
    position_S = torch.arange(LONGEST)
    slots = [table_P[position_S // BLOCK] * BLOCK + position_S % BLOCK for table_P in past.tables_BP]
    keys, values = ([kept_SGC[own_S] for own_S in slots] for kept_SGC in past.cache.layers[0])
    torch.testing.assert_close(found, expected(parts, q_THC, keys, values, spec), atol=1e-5, rtol=1e-5)
