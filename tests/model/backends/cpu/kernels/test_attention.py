"""Attention over a paged cache: its values, and bits that depend neither on the chunk nor on the other sequences."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from model.backends.cpu.kernels import reference_attention
from model.backends.cpu.kernels.build import SOURCES
from model.backends.cpu.kernels.pack import Kind
from model.shapes.decoder import DecoderConfig
from model.shapes.rope import Rope
from tests.model.backends.cpu.kernels.cases import KINDS, Make, assert_close, ops
from tests.model.backends.cpu.kernels.pages import AttendCase, AttentionCase, attend_case, attention_case, with_rows
from tests.model.tiny import gpt2_like, infinity, llama_like

FLOAT, BF16 = torch.float32, torch.bfloat16
each_dtype = pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
each_kind = pytest.mark.parametrize("kind", KINDS)
# The widest keys have more words than are widened at a time.
HEADS = [(1, 1, 16), (4, 4, 16), (6, 2, 32), (8, 1, 48), (33, 3, 16), (32, 1, 16), (70, 1, 16), (2, 1, 80), (5, 5, 272)]
RULES: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 5},
    {"window": 64},
    {"window": 70, "softcap": 3.0, "sinks": True},
    {"softcap": 0.5},
    {"sinks": True},
    {"chunk": 48, "window": 40},
    {"chunk": 130},
]


def check(case: AttendCase | AttentionCase, make: Make, largest: int = 40) -> None:
    """Values, and equal bits at once, in random chunks with random company, and token by token."""
    whole = case.run(case.layout.whole())
    # Of a long context's values little is left but what the sums have lost.
    exact = 1e-5 if max(case.layout.lengths) < 1000 else 3e-5
    assert_close(whole, case.expected(), case.dtype == BF16, most=1e-2, exact=exact)
    for schedule in (case.layout.chunks(make, largest), case.layout.singles()):
        assert torch.equal(case.run(schedule), whole)


def test_the_reference_rounds_after_as_many_keys_as_the_kernel() -> None:
    sources = "".join((SOURCES / name).read_text() for name in ("turn.h", "attender.h"))
    found = [int(number) for number in re.findall(r"constexpr int64_t (?:KEYS|PART) = (\d+);", sources)]
    assert found == [reference_attention.ROUND, reference_attention.PART]


@each_dtype
@pytest.mark.parametrize("heads, kv_heads, head", HEADS)
def test_heads_and_groups(dtype: torch.dtype, heads: int, kv_heads: int, head: int) -> None:
    make = Make(heads + head)
    check(attend_case(make, [1, 40, 17, 70], heads, kv_heads, head, dtype), make)


@pytest.mark.parametrize("heads, kv_heads, head, rules", [(6, 2, 48, 0), (2, 2, 80, 4), (3, 3, 64, 7)])
def test_a_cache_in_int8(heads: int, kv_heads: int, head: int, rules: int) -> None:
    """With one query per key-value head a product has its own tiles."""
    make = Make(rules)
    check(attend_case(make, [3, 150, 64, 1], heads, kv_heads, head, torch.int8, **RULES[rules]), make)


def test_a_long_cache_in_int8() -> None:
    make = Make(5)
    case = attend_case(make, [1100, 40], 4, 1, 16, torch.int8, block_size=32)
    check(case, make, largest=500)
    assert torch.equal(at_threads(case, 1), at_threads(case, 3))


@each_dtype
@pytest.mark.parametrize("heads, head, values", [(3, 48, 32), (40, 80, 64), (16, 144, 96)])
def test_values_that_are_part_of_the_keys(dtype: torch.dtype, heads: int, head: int, values: int) -> None:
    make = Make(heads)
    case = attend_case(make, [1, 40, 150, 16], heads, 1, head, dtype, values=values, sinks=heads == 3)
    check(case, make)
    ops.set_threads(5)  # more than there are tiles: these have fewer heads each
    assert torch.equal(case.run(case.layout.singles()), case.run(case.layout.whole()))


@each_dtype
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_rules(dtype: torch.dtype, rules: dict[str, Any]) -> None:
    make = Make(len(rules))
    check(attend_case(make, [3, 150, 64, 65], 4, 2, 16, dtype, **rules), make)


@each_dtype
@pytest.mark.parametrize("rules", RULES[::4], ids=str)
def test_contexts_of_several_parts(dtype: torch.dtype, rules: dict[str, Any]) -> None:
    """Long chunks of many sequences compute their parts in turn; few tokens, as in `singles`, side by side."""
    make = Make(9)
    check(attend_case(make, [1024, 1025, 1100], 4, 1, 16, dtype, **rules), make, largest=500)


@each_dtype
def test_a_context_of_three_parts(dtype: torch.dtype) -> None:
    make = Make(9)
    case = attend_case(make, [2112], 2, 1, 16, dtype, window=2000, sinks=True)
    check(case, make, largest=700)
    assert torch.equal(at_threads(case, 1), at_threads(case, 3))


@each_dtype
@pytest.mark.parametrize("block_size", [16, 48, 64])
def test_block_sizes(dtype: torch.dtype, block_size: int) -> None:
    make = Make(block_size)
    check(attend_case(make, [100, 47, 48, 49], 4, 2, 16, dtype, block_size=block_size), make)


def at_threads(case: AttendCase | AttentionCase, threads: int) -> Tensor:
    """Whole prompts, then single tokens of all but their last."""
    ops.set_threads(threads)
    whole, lengths = case.layout.whole(), case.layout.lengths
    decode = [[(s, n - 2, n - 1) for s, n in enumerate(lengths)], [(s, n - 1, n) for s, n in enumerate(lengths)]]
    return torch.cat([case.run(whole), case.run([[(s, 0, n - 2) for s, n in enumerate(lengths)], *decode])])


@each_dtype
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    for lengths in ([90, 12, 33], [1500], [1040, 3, 1030]):
        case = attend_case(Make(1), lengths, 4, 2, 16, dtype)
        one, two, three = (at_threads(case, threads) for threads in (1, 2, 3))
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("dtype", [FLOAT, BF16, torch.int8], ids=str)
def test_a_sequence_that_is_not_finite_harms_no_other(dtype: torch.dtype) -> None:
    case = attend_case(Make(1), [30, 40, 50], 4, 2, 16, dtype)
    schedule = case.layout.chunks(Make(2), 9)
    clean = case.run(schedule)
    for tensor in (case.q_THC, case.k_TGC, case.v_TGC):
        assert tensor is not None
        tensor[30 + 25] = torch.nan
        found, theirs = case.run(schedule), torch.arange(120)
        assert found[30 + 25].isnan().all()
        others = (theirs < 30) | (theirs >= 70)
        assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("dtype, values", [(FLOAT, 0), (FLOAT, 32), (BF16, 0), (BF16, 32), (torch.int8, 0)])
def test_blocks_that_failed_and_are_used_again(dtype: torch.dtype, values: int) -> None:
    """What a sequence left in a block is gone for the next that writes there, tile by tile."""
    case = attend_case(Make(1), [50], 2, 2, 48, dtype, block_size=32, values=values)
    cache, (rows, spans, tables) = case.cache(), case.layout.step([(0, 0, 50)])
    bad = torch.full_like(case.k_TGC, torch.nan)
    ops.write_cache(bad, None if values else bad, cache, spans, tables, 32)
    for start, until in [(0, 7), (7, 30), (30, 50)]:
        rows, spans, tables = case.layout.step([(0, start, until)])
        ops.write_cache(case.k_TGC[rows], case.v_of(rows), cache, spans, tables, 32)
        found = ops.attend(case.q_THC[rows], cache, spans, tables, 32, values, case.rules.scale, 0, 0, 0.0, None)
        assert torch.equal(found, case.run(case.layout.whole())[rows])


@each_dtype
def test_writing_touches_no_block_of_others(dtype: torch.dtype) -> None:
    case = attend_case(Make(1), [20, 70, 33], 4, 2, 16, dtype)
    cache = torch.full_like(case.cache(), 7.0)
    rows, spans, tables = case.layout.step([(1, 0, 70)])
    ops.write_cache(case.k_TGC[rows], case.v_of(rows), cache, spans, tables, 16)
    touched = (cache.view(2, case.layout.blocks, -1) != 7.0).any(-1)
    for block in range(case.layout.blocks):
        assert touched[:, block].all() == (block in case.layout.tables[1])
        assert touched[:, block].any() == (block in case.layout.tables[1])


def test_no_rows() -> None:
    case = attend_case(Make(1), [20], 4, 2, 16, FLOAT)
    rows, spans, tables = case.layout.step([])
    cache = case.cache()
    ops.write_cache(case.k_TGC[rows], case.v_of(rows), cache, spans, tables, 16)
    assert ops.attend(case.q_THC[rows], cache, spans, tables, 16, 0, 1.0, 0, 0, 0.0, None).shape == (0, 4, 16)
    assert cache.isnan().all()


LAYERS: dict[str, tuple[DecoderConfig, dict[str, Any]]] = {
    "llama": (llama_like(infinity(), head_width=16), {}),
    "gpt2": (gpt2_like(infinity(), head_width=16, width=40), {}),
    "olmoe": (llama_like(infinity(), head_width=16, qk_norm="full", clip=0.8), {}),
    "qwen3": (llama_like(infinity(), head_width=32, qk_norm="full", width=33), {"norm_per_head": True}),
    "gpt-oss": (llama_like(infinity(), head_width=16, bias=True), {"window": 20, "sinks": True}),
    "llama4": (
        llama_like(infinity(), head_width=16, qk_norm="unit", rope=Rope(16), floor_scale=7, attn_scale=0.5),
        {"norm_per_head": True, "chunk": 30},
    ),
    "qwen3-next": (
        llama_like(infinity(), head_width=32, qk_norm="full", gated=True, rope=Rope(8), bias=True),
        {"norm_per_head": True},
    ),
    "gemma": (llama_like(infinity(), head_width=48, heads=3, kv_heads=1), {"softcap": 2.0, "block_size": 32}),
}


@each_kind
@pytest.mark.parametrize("name", LAYERS)
def test_blocks(kind: Kind, name: str) -> None:
    config, rest = LAYERS[name]
    make = Make(len(name))
    case = attention_case(make, [1, 60, 17, 110], config, kind, **rest)
    whole = case.run(case.layout.whole())
    # A key that was rounded to the other side is seen by all that come after it.
    assert_close(whole, case.expected(), kind != "float", most=1e-2, off=0.75)
    for schedule in (case.layout.chunks(make, 30), case.layout.singles()):
        assert torch.equal(case.run(schedule), whole)
    one, two, three = (at_threads(without_the_shortest(case), threads) for threads in (1, 2, 3))
    assert torch.equal(one, two) and torch.equal(one, three)


def without_the_shortest(case: AttentionCase) -> AttentionCase:
    """`at_threads` cuts two tokens off each sequence."""
    case.layout.lengths[0] = 3
    case.layout.starts = [0, 3, 63, 80]
    return with_rows(case, Make(1).normal(190, case.x_TD.shape[1]))


@each_kind
def test_a_block_where_one_sequence_is_not_finite(kind: Kind) -> None:
    case = attention_case(Make(1), [30, 40, 50], LAYERS["olmoe"][0], kind)
    schedule, theirs = case.layout.chunks(Make(2), 9), torch.arange(120)
    clean = case.run(schedule)
    case.x_TD[30 + 25, 3] = torch.inf
    found, others = case.run(schedule), (theirs < 30) | (theirs >= 70)
    assert found[30 + 25].isnan().all()
    assert torch.equal(found[others], clean[others])
