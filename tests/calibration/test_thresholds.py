"""Bisection to a mean count."""

import pytest

from calibration.thresholds import STEPS, bisect


@pytest.mark.parametrize("target", [1.5, 2.0, 3.0])
def test_a_falling_measure_is_brought_to_its_target(target: float) -> None:
    found = bisect(lambda value: 4 - 3 * value, target, falls=True)
    assert 4 - 3 * found <= target
    assert found == pytest.approx((4 - target) / 3, abs=2.0**-STEPS + 1e-3)


@pytest.mark.parametrize("target", [1.5, 2.0, 3.0])
def test_a_rising_measure_is_brought_to_its_target(target: float) -> None:
    found = bisect(lambda value: 1 + 3 * value, target, falls=False)
    assert 1 + 3 * found <= target
    assert found == pytest.approx((target - 1) / 3, abs=2.0**-STEPS + 1e-3)


def test_no_rule_where_none_runs_so_few() -> None:
    assert bisect(lambda value: 4.0, 2, falls=True) == 0.0
    assert bisect(lambda value: 4.0, 2, falls=False) == 0.0
