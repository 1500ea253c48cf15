"""Attention over pages against float64: decoding beside chunks, segments in turn or side by side, poisoned slots."""

import pytest
import torch
from torch import Tensor

from model.backends.cuda.kernels import attend as kernels
from model.backends.cuda.kernels import reference
from model.backends.cuda.kernels.attend import PAGE, QueryTiles, attend
from model.step import DistanceBias, MaskSpec

HEADS, KV_HEADS, WIDTH = 4, 2, 24
BLOCKS = 12


@pytest.fixture(autouse=True)
def short_segments(poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of these tests are cut as long ones are. Nothing may be read that was not written."""
    monkeypatch.setattr(kernels, "SEGMENT", 2 * PAGE)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Sequences:
    """Keys and values of sequences of so many tokens, each in blocks of its own in random order."""

    def __init__(self, contexts: list[int], dtype: torch.dtype = torch.float32) -> None:
        self.contexts, self.dtype = contexts, dtype
        self.cache_PSGC = torch.full((2, BLOCKS * PAGE, KV_HEADS, WIDTH), torch.nan, dtype=dtype)
        free = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(9)).tolist()
        self.tables_BP = torch.zeros(len(contexts), 5, dtype=torch.int64)
        self.queries = []
        for row, context in enumerate(contexts):
            for block in range(-(-context // PAGE)):
                self.tables_BP[row, block] = free.pop()
            position_S = torch.arange(context)
            slot_S = self.tables_BP[row, position_S // PAGE] * PAGE + position_S % PAGE
            self.cache_PSGC[:, slot_S] = random(2, context, KV_HEADS, WIDTH, seed=row).to(dtype)
            self.queries.append(2 * random(context, HEADS, WIDTH, seed=10 + row).to(dtype))

    def step(self, rows: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, tables and spans of a step: (sequence, new tokens, context with them) each."""
        spans, parts, first = [], [], 0
        for sequence, length, context in rows:
            spans.append((first, length, context))
            parts.append(self.queries[sequence][context - length : context])
            first += length
        tables_BP = self.tables_BP[[sequence for sequence, *_ in rows]]
        return torch.cat(parts), tables_BP, torch.tensor(spans)

    def run(
        self, rows: list[tuple[int, int, int]], spec: MaskSpec, tile: int, at_once: bool, softcap: float = 0.0
    ) -> Tensor:
        q_THC, tables_BP, spans_B3 = self.step(rows)
        out_THC = torch.full_like(q_THC, torch.nan)
        tiles = tiles_of([length for _, length, _ in rows], tile)
        longest = int(spans_B3[:, 2].max()) + 300  # a bound of the host's
        places = (self.cache_PSGC, tables_BP, spans_B3, tiles, longest)
        attend(q_THC, *places, spec, out_THC, softcap, at_once)
        return out_THC

    def expected(self, rows: list[tuple[int, int, int]], spec: MaskSpec, softcap: float = 0.0) -> Tensor:
        q_THC, tables_BP, spans_B3 = self.step(rows)
        return reference.attend(q_THC, self.cache_PSGC, tables_BP, spans_B3, spec, PAGE, softcap)


def tiles_of(lengths: list[int], rows: int) -> QueryTiles:
    """Every sequence's new tokens in tiles, and an empty tile at the end."""
    places = [(sequence, first) for sequence, length in enumerate(lengths) for first in range(0, length, rows)]
    sequence_N, first_N = torch.tensor([*places, (-1, 0)], dtype=torch.int32).unbind(1)
    return QueryTiles(sequence_N.contiguous(), first_N.contiguous(), rows)


SCALE = WIDTH**-0.5
SPECS = {
    "plain": MaskSpec(SCALE),
    "window": MaskSpec(SCALE, window=70),
    "chunk": MaskSpec(SCALE, chunk=90),
    "sinks": MaskSpec(SCALE, sinks_H=torch.tensor([-1.0, 0.0, 2.0, 30.0])),
    "window and sinks": MaskSpec(SCALE, window=5, sinks_H=torch.tensor([-1.0, 0.0, 2.0, 30.0])),
}
MIXED = [(0, 1, 291), (1, 1, 1), (2, 13, 150), (3, 1, 128)]


# Side by side, "window and sinks" has what either of them has alone.
COVERED = {("window", True): pytest.mark.redundant, ("sinks", True): pytest.mark.redundant}


@pytest.mark.parametrize(
    ("spec", "at_once"),
    [
        pytest.param(spec, at_once, marks=COVERED.get((name, at_once), ()), id=f"{name}-{at_once}")
        for name, spec in SPECS.items()
        for at_once in (False, True)
    ],
)
def test_decoding_beside_a_chunk(spec: MaskSpec, at_once: bool) -> None:
    sequences = Sequences([291, 1, 150, 128])
    found_THC = sequences.run(MIXED, spec, 8, at_once)
    torch.testing.assert_close(found_THC.double(), sequences.expected(MIXED, spec), atol=1e-5, rtol=1e-5)


def test_half_precision_and_a_soft_cap() -> None:
    rows, sequences = [(0, 3, 150)], Sequences([150], torch.float16)
    found_THC = sequences.run(rows, SPECS["sinks"], 8, True, softcap=1.5)
    wanted_THC = sequences.expected(rows, SPECS["sinks"], 1.5)
    torch.testing.assert_close(found_THC.double(), wanted_THC, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("at_once", [False, True])
def test_gates_multiply_the_result(at_once: bool) -> None:
    """They lie behind the queries of each head."""
    sequences, rows, spec = Sequences([150, 140]), [(0, 2, 150), (1, 1, 140)], SPECS["plain"]
    q_THC, tables_BP, spans_B3 = sequences.step(rows)
    gate_THC = random(3, HEADS, 2 * WIDTH, seed=7)[..., WIDTH:]
    out_THC, places = torch.full_like(q_THC, torch.nan), (tables_BP, spans_B3, tiles_of([2, 1], 2), 150)
    attend(q_THC, sequences.cache_PSGC, *places, spec, out_THC, side_by_side=at_once, gate_THC=gate_THC)
    wanted_THC = sequences.expected(rows, spec) * gate_THC.double().sigmoid()
    torch.testing.assert_close(out_THC.double(), wanted_THC, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "window and sinks"])
def test_a_querys_bits_depend_on_its_past_alone(name: str, chains: None) -> None:
    """A chunk in tiles of two sizes beside another sequence, and its last tokens one by one."""
    sequences, spec = Sequences([200, 140]), SPECS[name]
    chunk_THC = sequences.run([(1, 1, 140), (0, 20, 200)], spec, 8, False)[1:]
    assert torch.equal(sequences.run([(0, 20, 200)], spec, 16, True), chunk_THC)
    for last, at_once in ((181, False), (192, True), (193, False), (200, True)):
        one_1HC = sequences.run([(0, 1, last)], spec, 1, at_once)
        assert torch.equal(one_1HC[0], chunk_THC[last - 181])


def test_scores_far_below_zero() -> None:
    """Each is about -300, whose power is 0 in float32: only what is relative to the largest can be told apart."""
    sequences, rows = Sequences([70]), [(0, 1, 70)]
    sequences.queries[0] += 10
    sequences.cache_PSGC[0] -= 6
    found_THC = sequences.run(rows, SPECS["plain"], 8, False)
    torch.testing.assert_close(found_THC.double(), sequences.expected(rows, SPECS["plain"]), atol=1e-4, rtol=1e-4)


def test_tokens_without_a_tile_are_left_alone() -> None:
    sequences = Sequences([70])
    q_THC, tables_BP, spans_B3 = sequences.step([(0, 4, 70)])
    out_THC = torch.full_like(q_THC, torch.nan)
    tiles = QueryTiles(torch.tensor([-1, 0], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32), 2)
    attend(q_THC, sequences.cache_PSGC, tables_BP, spans_B3, tiles, 70, SPECS["plain"], out_THC)
    assert out_THC.isnan().flatten(1).all(1).tolist() == [True, True, False, False]


@pytest.mark.parametrize("spec", [MaskSpec(1.0, causal=False), MaskSpec(1.0, bias=DistanceBias(torch.zeros(4, 1), 0))])
def test_what_has_no_kernel_is_an_error(spec: MaskSpec) -> None:
    with pytest.raises(ValueError, match="attention to later tokens, or with a bias by distance"):
        Sequences([70]).run([(0, 1, 70)], spec, 1, False)


def test_too_many_queries_for_a_tile_are_an_error() -> None:
    with pytest.raises(ValueError, match="17 tokens of 2 heads each are more than 32 queries"):
        Sequences([70]).run([(0, 17, 70)], SPECS["plain"], 17, False)
