"""Grouped matrices: the kernels' bits are those of the chain that csrc/grouped.h describes, in every library.

The chain is computed here in float32 and integers, with each multiply-add rounded once.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.backends.cpu.kernels.groups import Layout, codes_of, words_of
from model.backends.cpu.kernels.pack import interleave, pack, unpack, unpack_grouped
from model.backends.cpu.kernels.params import LinearParams, NormParams, by_schema, named
from model.backends.cpu.kernels.quantise import quantise_int4
from model.backends.cpu.kernels.reference import BLOCK, Weight
from model.errors import CheckpointError
from model.grouped import CODES, GROUPS, Grouped, Values, code_bits, packed_codes
from tests.model.backends.cpu.kernels.cases import Make, assert_close, grouped, ops
from tests.model.backends.cpu.kernels.latent_cases import latent_case

VALUES: tuple[Values, ...] = (*CODES, "bytes")
Floats = NDArray[np.float32]


def fused(left: Floats, right: Floats, total: Floats) -> Floats:
    """left * right + total, rounded to float32 once: by way of float64, rounded to odd where it is not exact."""
    product_64 = left.astype(np.float64) * right  # exact: 48 bits
    sum_64 = product_64 + total
    part = sum_64 - product_64
    error = (product_64 - (sum_64 - part)) + (total - part)
    even = (sum_64.view(np.int64) & 1) == 0
    nudged = np.nextafter(sum_64, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even, nudged, sum_64).astype(np.float32)


def encoded(x_RK: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Codes and scale of each row in one block."""
    most_R1 = np.abs(x_RK).max(-1, keepdims=True)
    inverse_R1 = np.divide(np.float32(127), most_R1, out=np.zeros_like(most_R1), where=most_R1 != 0)
    return np.rint(x_RK * inverse_R1).astype(np.int64), most_R1 / np.float32(127)


def chain(x: Tensor, weight: Grouped) -> Tensor:
    """W x for one matrix, [R, n], by the chain."""
    values_NK, group = weight.integers().long().numpy(), weight.group
    scales_NG = weight.scales.float().numpy()
    minima_NG = np.zeros_like(scales_NG) if weight.minima is None else weight.minima.float().numpy()
    x_RK = x.numpy()
    total_RN = np.zeros((len(x_RK), len(values_NK)), np.float32)
    for start in range(0, x_RK.shape[1], BLOCK):
        codes_RK, scale_R1 = encoded(x_RK[:, start : start + BLOCK])
        block_RN, exact_RN = np.zeros_like(total_RN), np.zeros(total_RN.shape, np.int64)
        codes_RGI = codes_RK.reshape(len(codes_RK), -1, group)
        groups = range(codes_RGI.shape[1])
        for at in groups:
            first = start + at * group
            group_RN, scales_N = codes_RGI[:, at] @ values_NK[:, first : first + group].T, scales_NG[:, first // group]
            if weight.scales.dtype == torch.int8:
                exact_RN += group_RN * scales_N.astype(np.int64)
                block_RN = exact_RN.astype(np.float32)
            else:
                block_RN = fused(group_RN.astype(np.float32), scales_N, block_RN)
        for at in groups if weight.minima is not None else ():  # after all scales
            sums_R1 = codes_RGI[:, at].sum(-1, keepdims=True).astype(np.float32)
            minima_N = minima_NG[:, start // group + at]
            block_RN = fused(np.broadcast_to(sums_R1, block_RN.shape), minima_N, block_RN)
        total_RN = fused(block_RN, np.broadcast_to(scale_R1, block_RN.shape), total_RN)
    return torch.from_numpy(total_RN) * (1 if weight.factors is None else weight.factors)


def linear(x_RK: Tensor, weight: Grouped) -> Tensor:
    result: Tensor = ops.linear(x_RK, *LinearParams(NormParams(), pack(weight, "float"), weight.shape[0]).arguments())
    return result


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("minima", [False, True])
def test_bits_are_those_of_the_chain(values: Values, group: int, minima: bool) -> None:
    """Panels of 64 with and without a tail of 16, 32 or 48; one block, part of one, several; tiles of 1 to 4 rows, and
    so many rows that codes are unpacked first, in whole and part blocks."""
    make = Make(group)
    shapes = [(16, group, 1), (100, 128, 2), (33, 3 * 128, 3), (113, 5 * 128, 4), (80, 3 * 128, 7)]
    for n, k, rows in shapes:
        weight, x_RK = grouped(make, n, k, group, values, minima), make.normal(rows, k)
        x_RK[:, k // 3] *= 20  # one block has an outlier
        assert torch.equal(linear(x_RK, weight), chain(x_RK, weight)), (n, k, rows)


def test_bits_at_the_largest_sums() -> None:
    """Sums of 16 bits on the way must not overflow: largest codes of both sides, times 127 of both signs."""
    for values, high, sign in product(VALUES, (False, True), (1.0, -1.0)):
        numbers = range(-128, 128) if values == "bytes" else CODES[values]
        extreme = max(numbers) if high else min(numbers)
        code = extreme if values == "bytes" else CODES[values].index(extreme)
        codes = torch.full((16, 256), code, dtype=torch.int8 if values == "bytes" else torch.uint8)
        stored = codes if values == "bytes" else packed_codes(codes, code_bits(values))
        weight = Grouped(stored, torch.ones(16, 2).half(), 128, values)
        x_RK = torch.full((5, 256), sign)
        for rows in (3, 5):
            assert torch.equal(linear(x_RK[:rows], weight), chain(x_RK[:rows], weight)), (values, high, sign)


@pytest.mark.parametrize("values", ["signed", "unsigned", "table6", "iq4"])
@pytest.mark.parametrize("group", GROUPS)
def test_whole_scales_are_exact_in_a_block(values: Values, group: int) -> None:
    """Near the largest sums, where a chain of floats would be rounded after each group."""
    make, extreme = Make(group), max(CODES[values], key=abs)
    codes = make.whole(0, 15, 20, 512)
    codes[make.whole(0, 9, 20, 512) > 0] = CODES[values].index(extreme)
    scales = make.whole(0, 1, 20, 512 // group).to(torch.int8) - 128
    weight = Grouped(packed_codes(codes), scales, group, values, None, torch.ones(20))
    x_RK = make.normal(7, 512, scale=0.01) + 1
    full = linear(x_RK, weight)
    assert torch.equal(full, chain(x_RK, weight))
    assert torch.equal(linear(x_RK[:1], weight), full[:1]) and torch.equal(linear(x_RK[:3], weight), full[:3])


@pytest.mark.parametrize("first", [-40, 5, 20, 100])
def test_any_table_of_neighbouring_integers(first: int) -> None:
    """Its codes are multiplied as they are where they are small; the first and the last two are not."""
    make = Make(11)
    weight, x_RK = grouped(make, 16, 256, 128, "signed", False), make.normal(5, 256)
    table = torch.arange(first, first + 16).to(torch.int8)
    same = replace(weight, codes=weight.integers() + 8 + first, values="bytes")
    given = named(LinearParams(NormParams(), pack(weight, "float"), 16)) | {"weight_table": table}
    for rows in (3, 5):
        found = ops.linear(x_RK[:rows], *by_schema("linear", given))
        assert torch.equal(found, chain(x_RK[:rows], same))


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    make = Make(3)
    weight, x_RK = grouped(make, 200, 320, 32, "table6", False), make.normal(101, 320)
    full = linear(x_RK, weight)
    assert torch.equal(full, chain(x_RK, weight))
    for rows in (slice(0, 1), slice(3, 8), slice(50, 101)):
        assert torch.equal(linear(x_RK[rows], weight), full[rows])


@pytest.mark.parametrize("values", ["unsigned", "e2m1", "iq4"])
def test_matrices_of_the_same_rows_may_have_other_codes(values: Values) -> None:
    """Rows are encoded for the codes that multiply them: here first for a table's, then for others."""
    make = Make(5)
    case = latent_case(make, [9, 4], "grouped", query_rank=0, width=64)
    query = pack(grouped(make, 3 * (12 + 16), 64, 32, values, values == "unsigned"), "float")
    case.packed["query"], case.block = query, replace(case.block, query=Weight.of(query))
    assert case.packed["down"].group == query.group
    assert_close(case.run(case.layout.whole()), case.expected(), True, most=5e-2, exact=2e-5, off=0.9)


@pytest.mark.parametrize("values", VALUES)
def test_packing_keeps_codes_and_scales(values: Values) -> None:
    for (n, k), group in product([(5, 128), (64, 128), (176, 256)], GROUPS):
        weight = grouped(Make(n), n, k, group, values, group == 64, 3)
        packed = pack(weight, "float")
        assert packed.nbytes == packed.packed.nbytes + 12 * (n + -n % 16)
        assert packed.byte_scales == (values == "table6")
        assert torch.equal(unpack(packed, 3), weight.dense())
        stored = unpack_grouped(packed, 3)
        assert torch.equal(stored.codes[:, :n], weight.codes) and not stored.scales[:, n:].any()


WORDS: dict[Values, list[int]] = {
    "iq4": [0x73625140, 0xFBEAD9C8],
    "signed6": [0xC3824100, 0xC7C6C5C4, 0x0B0A0908],
    "bytes": [0x7B7A7978, 0x7F7E7D7C, 0x83828180, 0x87868584],
}


@pytest.mark.parametrize("values", WORDS)
def test_words_hold_neighbouring_inputs(values: Values) -> None:
    codes = torch.arange(16)
    stored = (codes - 8).to(torch.int8) if values == "bytes" else packed_codes(codes, code_bits(values))
    weight = Grouped(stored[None], torch.ones(1, 1).half(), 16, values)
    layout = Layout.of(weight)
    words_NGW = words_of(weight.codes, layout)
    assert [int(word) & 0xFFFFFFFF for word in words_NGW.flatten()] == WORDS[values]
    assert torch.equal(codes_of(words_NGW, layout), weight.codes)


@pytest.mark.parametrize("units", [16, 20, 64, 100])
def test_gates_and_ups_are_interleaved_as_their_values_are(units: int) -> None:
    weight = grouped(Make(units), 2 * units, 64, 32, "unsigned", True, 2)
    assert torch.equal(interleave(weight).dense(), interleave(weight.dense()))


def test_what_is_not_finite_is_refused() -> None:
    weight = grouped(Make(1), 16, 32, 32, "signed", True)
    assert weight.minima is not None
    weight.minima[3, 0] = torch.inf
    with pytest.raises(ValueError, match=r"a grouped matrix \[16, 32\] has a scale, minimum or factor that is not fin"):
        pack(weight, "float")


def test_quantised_weights_are_near_and_their_scales_are_integers() -> None:
    weight = Make(1).weight(3, 40, 256)
    found = quantise_int4(weight)
    assert (found.group, found.values, found.minima) == (32, "table6", None)
    assert found.scales.dtype == torch.int8 and found.scales.abs().amax() == 127
    assert found.nbytes == 3 * 40 * (256 * 4.25 / 8 + 4)
    error = (found.dense() - weight).square().mean() / weight.square().mean()
    assert error < 0.0056  # the best of any scales leaves 0.0055
    assert torch.equal(quantise_int4(weight.bfloat16()).dense(), quantise_int4(weight.bfloat16().float()).dense())


def searched(x_K: Floats, table: Floats) -> np.float32:
    """The scale that csrc/quantiser.h finds for a group, with its roundings: 16 running sums, joined by halves."""

    def total(terms_K: Floats) -> np.float32:
        lanes = sum(terms_K.reshape(-1, 16), np.zeros(16, np.float32))
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        return np.float32(lanes[0])

    extreme, bounds, found = x_K[np.abs(x_K).argmax()], (table[1:] + table[:-1]) / 2, (np.float32(0), np.float32(0))
    for end, attempt in product(table[[0, -1]], range(10)):
        inverse = end * (np.float32(0.8) + np.float32(0.04) * np.float32(attempt)) / extreme
        rounded_K = table[np.searchsorted(bounds, x_K * inverse)]
        product_sum, square = total(x_K * rounded_K), total(rounded_K * rounded_K)
        if square > 0 and product_sum * product_sum > found[0] * square:
            found = product_sum * product_sum / square, product_sum / square
    return found[1]


def test_scales_have_the_same_bits_in_every_library() -> None:
    weight_NK = Make(32).weight(60, 128)
    found, table = quantise_int4(weight_NK), np.array(CODES["table6"], np.float32)
    assert found.group == 32 and found.factors is not None
    for row_K, factor in zip(weight_NK.numpy(), found.factors, strict=True):
        largest = max(abs(searched(x_K, table)) for x_K in row_K.reshape(-1, 32))
        assert factor == largest / np.float32(127)


def test_weights_that_the_table_has_stay_as_they_are() -> None:
    make = Make(2)
    weight = grouped(make, 20, 128, 32, "table6", False)
    integers = weight.integers().float().unflatten(-1, (4, 32))
    integers[..., 0] = -32  # each group has the table's end
    scales = make.whole(-127, 127, 20, 4).float()
    scales[:, 1] = 127
    exact = (integers * scales[..., None]).flatten(1) * 2**-6
    assert torch.allclose(quantise_int4(exact).dense(), exact, rtol=1e-6)


def test_groups_of_zeros_and_inputs_that_are_no_whole_group() -> None:
    weight = Make(3).weight(20, 40)
    weight[3], weight[5, :16] = 0, 0
    found = quantise_int4(weight)
    assert found.group == 16 and found.shape == (20, 48)
    dense = found.dense()
    assert not dense[3].any() and not dense[5, :16].any() and not dense[:, 40:].any() and dense[4, :40].any()
    assert quantise_int4(torch.zeros(2, 72)).shape == (2, 80) and quantise_int4(torch.zeros(2, 90)).shape == (2, 96)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = Make(4).weight(2, 20, 33)
    weight[1, 3, 32] = bad
    with pytest.raises(CheckpointError, match=r"quantize int4: a weight of a matrix \[20, 33\] is not finite"):
        quantise_int4(weight)
