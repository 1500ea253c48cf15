"""The highest logit of each row against its definition."""

import pytest
import torch

from tests.model.backends.cpu.kernels.cases import Make, argmax_case, check, ops


@pytest.mark.parametrize("width", [5, 16, 17, 100, 1000])
def test_many_are_equal(width: int) -> None:
    check(argmax_case(Make(width), 9, width))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 15, 16, 19])
def test_a_row_that_is_not_finite_has_none(value: float, at: int) -> None:
    x_TD = torch.zeros(3, 20)
    x_TD[1, at] = value
    assert ops.argmax(x_TD).tolist() == [0, -1, 0]


def test_no_rows() -> None:
    assert ops.argmax(torch.zeros(0, 4)).tolist() == []


def test_one_logit() -> None:
    assert ops.argmax(torch.zeros(2, 1)).tolist() == [0, 0]
