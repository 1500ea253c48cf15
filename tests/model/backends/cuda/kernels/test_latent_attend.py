"""Latent attention over pages against float64: decoding beside a chunk, segments in turn or side by side."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.backends.cuda.kernels import latent_attend as kernels
from model.backends.cuda.kernels import reference
from model.backends.cuda.kernels.attend import PAGE, splits
from model.backends.cuda.kernels.latent_attend import attend_latent
from model.step import MaskSpec
from tests.model.backends.cuda.kernels.test_attend import BLOCKS, random, tiles_of

HEADS, RANK, TURNED = 5, 24, 6
SCALE = 0.2


@pytest.fixture(autouse=True)
def short_segments(poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of these tests are cut as long ones are. Nothing may be read that was not written."""
    monkeypatch.setattr(kernels, "SEGMENT", PAGE)


class Sequences:
    """Latents and rotary keys of sequences of so many tokens, each in blocks of its own in random order."""

    def __init__(self, contexts: list[int], dtype: torch.dtype = torch.float32) -> None:
        self.cache_PSGC = torch.full((1, BLOCKS * PAGE, 1, RANK + TURNED), torch.nan, dtype=dtype)
        free = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(9)).tolist()
        self.tables_BP = torch.zeros(len(contexts), 3, dtype=torch.int64)
        self.queries = []
        for row, context in enumerate(contexts):
            for block in range(-(-context // PAGE)):
                self.tables_BP[row, block] = free.pop()
            position_S = torch.arange(context)
            slot_S = self.tables_BP[row, position_S // PAGE] * PAGE + position_S % PAGE
            self.cache_PSGC[0, slot_S, 0] = random(context, RANK + TURNED, seed=row).to(dtype)
            self.queries.append(2 * random(context, HEADS, RANK + TURNED, seed=10 + row).to(dtype))

    def step(self, rows: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, tables and spans of a step: (sequence, new tokens, context with them) each."""
        spans, parts, first = [], [], 0
        for sequence, length, context in rows:
            spans.append((first, length, context))
            parts.append(self.queries[sequence][context - length : context])
            first += length
        tables_BP = self.tables_BP[[sequence for sequence, *_ in rows]]
        return torch.cat(parts), tables_BP, torch.tensor(spans)

    def run(self, rows: list[tuple[int, int, int]], tile: int, at_once: bool) -> Tensor:
        q_THC, tables_BP, spans_B3 = self.step(rows)
        out_THR = torch.full((*q_THC.shape[:2], RANK), torch.nan, dtype=q_THC.dtype)
        places: tuple[Any, ...] = (tables_BP, spans_B3, tiles_of([length for _, length, _ in rows], tile), 250)
        attend_latent(q_THC, self.cache_PSGC, *places, SCALE, out_THR, at_once)
        return out_THR

    def expected(self, rows: list[tuple[int, int, int]]) -> Tensor:
        """Attention whose values are whole keys, of which the latents are kept."""
        q_THC, tables_BP, spans_B3 = self.step(rows)
        cache_PSGC = self.cache_PSGC.expand(2, -1, -1, -1)
        return reference.attend(q_THC, cache_PSGC, tables_BP, spans_B3, MaskSpec(SCALE), PAGE)[..., :RANK]


MIXED = [(0, 1, 150), (1, 1, 1), (2, 9, 131)]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("tile", [1, 4])  # five queries are not a whole program, 20 are more than one
def test_decoding_beside_a_chunk(at_once: bool, tile: int) -> None:
    sequences = Sequences([150, 1, 131])
    found_THR = sequences.run(MIXED, tile, at_once)
    torch.testing.assert_close(found_THR.double(), sequences.expected(MIXED), atol=1e-5, rtol=1e-5)


def test_half_precision() -> None:
    rows, sequences = [(0, 3, 130)], Sequences([130], torch.float16)
    found_THR = sequences.run(rows, 3, True)
    torch.testing.assert_close(found_THR.double(), sequences.expected(rows), atol=4e-3, rtol=4e-3)


def test_a_querys_bits_depend_on_its_past_alone(chains: None) -> None:
    """A chunk in tiles of two sizes beside another sequence, and its last tokens one by one."""
    sequences = Sequences([140, 70])
    chunk_THR = sequences.run([(1, 1, 70), (0, 7, 140)], 3, False)[1:]
    assert torch.equal(sequences.run([(0, 7, 140)], 2, True), chunk_THR)
    for last, at_once in ((134, False), (137, True), (140, True)):
        assert torch.equal(sequences.run([(0, 1, last)], 1, at_once)[0], chunk_THR[last - 134])


def test_tokens_without_a_tile_are_left_alone() -> None:
    """The last tile names no sequence."""
    sequences = Sequences([70])
    q_THC, tables_BP, spans_B3 = sequences.step([(0, 4, 70)])
    out_THR = torch.full((4, HEADS, RANK), torch.nan)
    tiles = tiles_of([2], 2)
    attend_latent(q_THC, sequences.cache_PSGC, tables_BP, spans_B3, tiles, 70, SCALE, out_THR)
    assert out_THR.isnan().flatten(1).all(1).tolist() == [False, False, True, True]


def test_segments_run_side_by_side_where_programs_are_few_and_what_waits_is_small() -> None:
    one, many = (torch.empty(tokens, 128, 576, device="meta") for tokens in (1, 32))
    assert splits(one, 64, 512, 8) and splits(many, 4, 512, 256)
    assert not splits(one, 1, 512, 8) and not splits(one, 64, 512, 264)
    assert not splits(many, 64, 512, 256)  # 512 MB
