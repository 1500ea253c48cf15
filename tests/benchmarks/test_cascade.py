"""The points of a cascade, on scores that were made up, and scores of documents beside those of a calibration."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cascade import Scored, Text, compare, score
from calibration.opening import opened
from calibration.options import Options
from engine.runner import ModelRunner
from tests.calibration.checkpoints import two_experts, write_text

MANY = 4  # documents, of ten tokens each


def made(count: int, loss: list[float], entropy: list[float]) -> Scored:
    return Scored(np.array(loss), np.array(entropy), 1 - np.array(entropy) / 4, np.full(MANY, 10.0 * count))


HARD, EASY = [20.0, 20.0, 10.0, 10.0], [10.0, 10.0, 10.0, 10.0]  # more experts help with the first two
BY_COUNT = {1: made(1, HARD, [3.0, 2.0, 1.0, 0.5]), 2: made(2, HARD, [3.0] * 4), 4: made(4, EASY, [1.0] * 4)}
TEXT = Text(40, 1, 4, BY_COUNT)


def test_each_threshold_is_a_point_from_the_low_count_to_both() -> None:
    points = TEXT.cascade(1, 4, TEXT.by_count[1].entropy_D)
    assert [cost for cost, _ in points] == [1, 2, 3, 4, 5], "the first run, and four more experts for a quarter each"
    qualities = [quality for _, quality in points]
    assert qualities == pytest.approx([np.exp(-20 / 40), np.exp(-10 / 40), 1, 1, 1])
    free = TEXT.cascade(1, 4, TEXT.by_count[1].entropy_D, first_run=False)
    assert [cost for cost, _ in free] == [1, 1.75, 2.5, 3.25, 4]


def test_areas_compare_it_with_fixed_counts_and_with_chance() -> None:
    """A measure that finds the documents that need more experts is worth its first runs here, and chance is not."""
    text = Text(TEXT.tokens, TEXT.layers, TEXT.trained, TEXT.by_count | {3: made(3, HARD, [1.0] * MANY)})
    found = compare(text, 1, 4)
    area = found["area"]
    low = np.exp(-0.5)
    assert area["fixed counts"] == pytest.approx((3 * (low + 1) / 2 + 1) / 4, abs=1e-4)
    assert area["second runs at random"] == pytest.approx((low + 1) / 2, abs=1e-4)
    assert area["cascade by entropy"] == area["cascade by margin"]
    free = area["by entropy, first runs free"]
    assert free > area["cascade by entropy"] > area["fixed counts"] > area["second runs at random"]
    assert found["fixed"][4] == 1 and found["at_cost_of"]["cascade by entropy"][3] == 1
    worst = made(1, HARD, [0.5, 1.0, 2.0, 3.0])
    wrong = Text(text.tokens, text.layers, text.trained, text.by_count | {1: worst})
    assert compare(wrong, 1, 4)["area"]["cascade by entropy"] == pytest.approx(area["second runs at random"], abs=1e-4)


def test_documents_are_scored_as_a_calibration_scores_windows() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, text = two_experts(Path(place) / "model"), write_text(Path(place) / "text.txt")
        with opened(Options(model=str(folder), text=[text], minutes=0.02, output=Path(place))) as found:
            run = found.run
            assert isinstance(run.runner, ModelRunner)
            windows = run.report.windows[:2]
            (expected,) = run.score([run.uniform(2)], type(run.report)("two", windows))
            scored = score(run.runner, windows, run.uniform(2))
            assert scored.loss_D.sum() == pytest.approx(expected.loss_sum, rel=1e-5)
            assert scored.pairs_D.sum() == expected.pairs
    assert ((scored.margin_D >= 0) & (scored.margin_D <= 1)).all()
    assert ((scored.entropy_D > 0) & (scored.entropy_D < np.log(run.config.vocabulary))).all()
