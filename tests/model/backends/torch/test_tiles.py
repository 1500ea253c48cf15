"""Attention over pages equals attention over whole sequences under every spec, and reads no more than it needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.backends.torch import tiles as module
from model.backends.torch.attend import PagedAttend
from model.backends.torch.tiles import WORKSPACE
from model.batch import Cache, Pages
from model.shapes.memory import PagedMemory
from model.step import MaskSpec

Spans = list[tuple[int, int]]  # of each sequence its new tokens, and all of them
BLOCK = 16


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that was made, and of all together."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.sum = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not func.is_view and not func._schema.is_mutable:
            self.largest = max(self.largest, made.nbytes)
            self.sum += made.nbytes
        return made


class Case:
    """Random keys and values of sequences in a cache whose blocks are in random order."""

    def __init__(self, spans: Spans, heads: int = 4, kv_heads: int = 2, width: int = 8, values: bool = True) -> None:
        torch.manual_seed(0)
        self.spans, used = spans, [-(-context // BLOCK) for _, context in spans]
        blocks = torch.randperm(sum(used)).split(used)
        self.tables_BP = torch.zeros(len(spans), max(used), dtype=torch.long)
        for table_P, own in zip(self.tables_BP, blocks, strict=True):
            table_P[: len(own)] = own
        self.cache = Cache(
            BLOCK, [torch.zeros(PagedMemory(kv_heads, width, values).tensor_shape(sum(used) * BLOCK, 0))]
        )
        self.cache.layers[0].normal_()
        rows = sum(new for new, _ in spans)
        self.q_THC = torch.randn(rows, heads, width)
        self.k_TGC = torch.randn(rows, kv_heads, width)
        self.v_TGV: Tensor | int = torch.randn(rows, kv_heads, width) if values else width - 2

    def run(self, spec: MaskSpec) -> Tensor:
        return self.attend().attend(0, self.q_THC, self.k_TGC, self.v_TGV, spec)

    def attend(self) -> PagedAttend:
        firsts = torch.tensor([0, *(new for new, _ in self.spans)]).cumsum(0).tolist()
        spans_B3 = torch.tensor([[first, *span] for first, span in zip(firsts, self.spans)])  # noqa: B905
        return PagedAttend(Pages(self.cache, self.tables_BP, spans_B3), torch.device("cpu"))

    def slots(self, index: int) -> Tensor:
        positions = torch.arange(self.spans[index][1])
        return self.tables_BP[index][positions // BLOCK] * BLOCK + positions % BLOCK

    def expected(self, spec: MaskSpec) -> Iterator[Tensor]:
        """Query by query in float64, from the cache as the step left it."""
        row = 0
        for index, (new, context) in enumerate(self.spans):
            k_SGC, *v = (part[self.slots(index)].double() for part in self.cache.layers[0])
            v_SGV = v[0] if v else k_SGC[..., : self.q_THC.shape[-1] - 2]
            for position in range(context - new, context):
                yield _one(self.q_THC[row].double(), k_SGC, v_SGV, position, spec)
                row += 1


def _one(q_HC: Tensor, k_SGC: Tensor, v_SGV: Tensor, position: int, spec: MaskSpec) -> Tensor:
    seen = [s for s in range(position + 1) if not spec.window or s > position - spec.window]
    seen = [s for s in seen if not spec.chunk or s // spec.chunk == position // spec.chunk]
    shared = len(q_HC) // k_SGC.shape[1]
    k_HSC, v_HSV = (t[seen].transpose(0, 1).repeat_interleave(shared, 0) for t in (k_SGC, v_SGV))
    score_HS = (k_HSC @ q_HC[:, :, None])[..., 0] * spec.scale
    if spec.sinks_H is not None:
        score_HS = torch.cat([score_HS, spec.sinks_H.double()[:, None]], 1)
    weight_HS = score_HS.softmax(-1)[:, : len(seen)]
    return (weight_HS[:, None] @ v_HSV)[:, 0]


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles of a few keys, so that short contexts have many."""
    before = module.TILE, module.MIN_TILE, module.WORKSPACE
    module.TILE, module.MIN_TILE, module.WORKSPACE = 2048, 4, 8192
    try:
        yield
    finally:
        module.TILE, module.MIN_TILE, module.WORKSPACE = before


span = st.integers(1, 90).flatmap(
    lambda context: st.tuples(st.one_of(st.just(1), st.integers(1, context)), st.just(context))
)


@given(
    spans=st.lists(span, min_size=1, max_size=6),
    window=st.sampled_from([0, 1, 7, 40]),
    chunk=st.sampled_from([0, 16]),
    sinks=st.booleans(),
    values=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_every_query_gets_what_it_sees(spans: Spans, window: int, chunk: int, sinks: bool, values: bool) -> None:
    spec = MaskSpec(0.3, window, chunk, torch.linspace(-2, 2, 4) if sinks else None)
    for tiles in (small_tiles(), None):
        case = Case(spans, values=values)
        if tiles is None:
            found_THV = case.run(spec)
        else:
            with tiles:
                found_THV = case.run(spec)
        torch.testing.assert_close(found_THV.double(), torch.stack(list(case.expected(spec))), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [0, 32])
def test_values_of_others_that_are_not_finite_stay_with_them(window: int) -> None:
    case = Case([(1, 90), (1, 60), (4, 50)])
    case.cache.layers[0][:, case.slots(0)] = torch.nan
    out_THV = case.run(MaskSpec(0.3, window))
    assert out_THV[0].isnan().any() and out_THV[1:].isfinite().all()


def test_one_long_context_does_not_stretch_short_ones() -> None:
    """What is read and written follows the sum of lengths: here 16 short decodes beside one 128 times as long."""
    case = Case([(1, 64)] * 16 + [(1, 8192)], heads=8, kv_heads=8, width=64)
    paged = case.attend()
    with Largest() as seen:
        paged.attend(0, case.q_THC, case.k_TGC, case.v_TGV, MaskSpec(0.1))
    cache = sum(context for _, context in case.spans) * 2 * 8 * 64 * 4
    assert seen.sum < 6 * cache  # padded to the longest it would be 8 times as much and more


@pytest.mark.parametrize(("new", "heads", "sinks"), [(512, 16, True), (1, 64, True), (2048, 16, False)])
def test_memory_has_a_bound(new: int, heads: int, sinks: bool) -> None:
    case = Case([(new, 8192)], heads=heads, kv_heads=8, width=64)
    paged = case.attend()
    with Largest() as seen:
        paged.attend(
            0, case.q_THC, case.k_TGC, case.v_TGV, MaskSpec(0.1, sinks_H=torch.zeros(heads) if sinks else None)
        )
    assert seen.largest <= WORKSPACE  # the scores of all pairs at once take 256 MiB and more


def test_a_window_reads_no_more_than_it_shows() -> None:
    case = Case([(1, 8192)] * 4, heads=8, kv_heads=8, width=64)
    paged = case.attend()
    with Largest() as seen:
        paged.attend(0, case.q_THC, case.k_TGC, case.v_TGV, MaskSpec(0.1, window=64))
    assert seen.sum < 4 * 64 * 2 * 8 * 64 * 4 * 6
