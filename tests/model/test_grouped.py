"""Grouped matrices stand for the values that their formula gives."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.grouped import CODES, GROUPS, Grouped, Values, code_bits, packed_codes


def _random(values: Values, group: int, seed: int) -> tuple[Grouped, torch.Tensor]:
    """Grouped matrices [2, 5, 2 · group], and the codes or bytes of each value."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 5, 2 * group)
    if values == "bytes":
        codes = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    else:
        codes = torch.randint(0, len(CODES[values]), shape, generator=generator)
    scales = torch.randn(2, 5, 2, generator=generator).half()
    minima = torch.randn(2, 5, 2, generator=generator).half() if values == "unsigned" else None
    factors = torch.rand(2, 5, generator=generator)
    stored = codes if values == "bytes" else packed_codes(codes, code_bits(values))
    return Grouped(stored, scales, group, values, minima, factors), codes


@given(st.sampled_from([*CODES, "bytes"]), st.sampled_from(GROUPS), st.integers(0, 99))
def test_a_value_is_its_factor_times_scale_times_integer_plus_minimum(values: Values, group: int, seed: int) -> None:
    grouped, codes = _random(values, group, seed)
    dense = grouped.dense()
    assert dense.shape == grouped.shape == (2, 5, 2 * group)
    assert grouped.factors is not None
    for place in [(0, 0, 0), (1, 4, 2 * group - 1), (1, 2, group)]:
        code = int(codes[place])
        output, scale_at = place[:2], (*place[:2], place[2] // group)
        integer = code if values == "bytes" else CODES[values][code]
        value = grouped.scales[scale_at].float() * integer
        if grouped.minima is not None:
            value += grouped.minima[scale_at].float()
        assert dense[place] == value * grouped.factors[output]


@given(st.sampled_from([*CODES, "bytes"]), st.integers(0, 99))
def test_rows_are_picked_before_or_after_with_the_same_values(values: Values, seed: int) -> None:
    grouped, _ = _random(values, 32, seed)
    index = torch.tensor([3, 0, 3])
    assert torch.equal(grouped.rows(index).dense(), grouped.dense()[:, index])
    assert torch.equal(grouped.rows(slice(0, 5, 2)).dense(), grouped.dense()[:, ::2])
