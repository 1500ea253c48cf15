"""Which normalisers are tried, and that one which restores what was lost is found."""

from dataclasses import replace

import pytest

from calibration.normalisers import candidates, spelled
from model.budget import Normaliser
from model.shapes.mixtures import Router, TopK

SHAPE = TopK(experts=32, width=8, trained=8)


@pytest.mark.parametrize(
    ("normalise", "count", "expected"),
    [
        (False, 4, ("kept", 5, 6, 16)),  # "raw" and k2 = 8 are the family's rule, k2 = 4 is "kept"
        (True, 4, ("raw", 5, 6, 8, 16)),  # "kept" and k2 = 4 are the family's rule, k2 = 32 is "raw"
        (False, 7, ("kept", 16)),
        (True, 7, ("raw", 8, 16)),
    ],
)
def test_candidates_are_unlike_the_family_and_each_other(
    normalise: bool, count: int, expected: tuple[Normaliser, ...]
) -> None:
    assert candidates(replace(SHAPE, router=Router(normalise=normalise)), count) == expected


def test_candidates_fit_the_experts() -> None:
    assert candidates(TopK(experts=8, width=8, trained=4, router=Router(normalise=True)), 2) == ("raw", 3, 4)


def test_normalisers_are_spelled_as_in_requests() -> None:
    assert [spelled(each) for each in ("raw", "kept", 16)] == ["raw", "kept", "k2=16"]
