"""The hull of cost and quality, and its area, on points whose answer is known."""

import pytest

from weights.calibration_hull import area, hull


def test_corners_are_the_points_that_no_mixture_of_others_reaches() -> None:
    points = [(1.0, 0.5), (2.0, 0.6), (3.0, 1.0), (4.0, 0.9)]  # the second lies below the line from first to third
    assert hull(points) == [(1.0, 0.5), (3.0, 1.0)]


def test_order_and_duplicates_do_not_matter() -> None:
    points = [(3.0, 1.0), (1.0, 0.5), (1.0, 0.4), (2.0, 0.9), (2.0, 0.9)]
    assert hull(points) == [(1.0, 0.5), (2.0, 0.9), (3.0, 1.0)]


def test_area_is_the_mean_of_the_best_quality_over_the_range_of_costs() -> None:
    assert area([(1.0, 0.5), (3.0, 1.0)]) == pytest.approx(0.75)
    assert area([(1.0, 0.5), (2.0, 1.0), (3.0, 0.8)]) == pytest.approx((0.75 + 1.0) / 2)


def test_area_without_a_range_is_the_best_quality() -> None:
    assert area([(2.0, 0.5), (2.0, 0.7)]) == 0.7
    assert area([]) == 0.0
