"""Masks of packed bits over logits against their definition, at widths that fill no word and no vector."""

import pytest
import torch

from model.backends.cpu.kernels import reference
from tests.model.backends.cpu.kernels.cases import Make, check, constrain_case, ops


@pytest.mark.parametrize("width", [1, 31, 32, 33, 63, 64, 65, 100, 1000, 4099])
@pytest.mark.parametrize("share", [0.001, 0.5, 1.0])
def test_what_a_mask_forbids_becomes_impossible(width: int, share: float) -> None:
    for seed in range(3):
        check(constrain_case(Make(seed), 9, width, share))


def test_every_row_to_the_bit() -> None:
    case = constrain_case(Make(7), 40, 321)
    assert torch.equal(case.run(torch.arange(40)), case.expected())


def test_a_row_left_without_a_finite_value_is_taken_as_it_was_before() -> None:
    x_BV, raw_BV = torch.full((2, 40), -torch.inf), torch.arange(80.0).view(2, 40)
    allowed_MW = torch.tensor([[0b101, 0b10]], dtype=torch.int32)
    for constrain in (ops.constrain, reference.constrain):
        y_BV = constrain(x_BV, raw_BV, allowed_MW, torch.tensor([0, -1]))
        assert y_BV[0].isfinite().nonzero().flatten().tolist() == [0, 2, 33] and y_BV[0, 33] == 33
        assert torch.equal(y_BV[1], x_BV[1]), "a row without a mask is left as it is"


def test_no_rows_and_no_masks() -> None:
    none_M1, no_rows = torch.zeros(0, 1).int(), torch.zeros(0, 4)
    assert ops.constrain(no_rows, no_rows, none_M1, torch.zeros(0).long()).numel() == 0
    assert ops.constrain(torch.ones(2, 4), torch.ones(2, 4), none_M1, torch.full((2,), -1)).sum() == 8
