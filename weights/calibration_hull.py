"""The upper hull of options in the plane of cost and quality, and the area under it. Standard library only."""

from collections.abc import Iterable
from itertools import pairwise

Point = tuple[float, float]  # cost, quality


def hull(points: Iterable[Point]) -> list[Point]:
    """The corners, by rising cost, of the least concave and non-decreasing function that is nowhere below a point.

    Between two corners lies what a share of the requests at one and the rest at the other cost and keep together. The
    last corner is the cheapest of those with the best quality; dearer points lie below the flat line that follows it.
    """
    corners: list[Point] = []
    for point in _rising(points):
        while len(corners) > 1 and _below(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def area(points: Iterable[Point]) -> float:
    """The average improvement in quality of RouterBench (arXiv 2403.12031, AIQ): the area under the hull from the least
    to the largest cost of all points, divided by that range; the hull is flat beyond its last corner. It is the mean of
    the best quality over evenly spread costs. Of points of one cost: the best quality; without points: 0."""
    given = list(points)
    corners = hull(given)
    if not corners:
        return 0.0
    dearest = max(cost for cost, _ in given)
    width = dearest - corners[0][0]
    if width == 0:
        return corners[-1][1]
    corners.append((dearest, corners[-1][1]))
    return sum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in pairwise(corners)) / width


def _rising(points: Iterable[Point]) -> list[Point]:
    """Those that are better than every cheaper one, by rising cost."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept


def _below(left: Point, middle: Point, right: Point) -> bool:
    """Whether the middle point is on or under the line between the others."""
    rise, run = right[1] - left[1], right[0] - left[0]
    return (middle[1] - left[1]) * run <= rise * (middle[0] - left[0])
