"""The counts of a step's rows, and the course of the learning rate."""

from collections import Counter

import pytest

from training.gpu.plan import Plan, draw_counts, schedule


@pytest.mark.parametrize("style", ["log", "uniform", "sandwich", "3"])
@pytest.mark.parametrize("rows", [1, 8, 48, 64])
def test_counts_fall_and_lie_in_range(style: str, rows: int) -> None:
    counts = draw_counts(style, rows, 16)
    assert len(counts) == rows
    assert counts == sorted(counts, reverse=True)
    assert all(1 <= count <= 16 for count in counts)


def test_log_gives_each_doubling_as_many_rows() -> None:
    counts = draw_counts("log", 4096, 16)
    octaves = Counter(count.bit_length() - 1 for count in counts)  # 1, 2-3, 4-7, 8-15, 16
    assert set(counts) == set(range(1, 17))
    assert all(0.24 < octaves[octave] / 4096 < 0.3 for octave in (1, 2, 3))
    assert octaves[0] / 4096 == pytest.approx(0.16, abs=0.01)
    assert 0.02 < octaves[4] / 4096 < 0.04


def test_uniform_gives_each_count_as_many_rows() -> None:
    assert Counter(draw_counts("uniform", 64, 16)) == dict.fromkeys(range(1, 17), 4)


def test_sandwich_gives_a_quarter_to_either_end() -> None:
    counts = draw_counts("sandwich", 64, 16)
    assert counts[:16] == [16] * 16 and counts[-16:] == [1] * 16
    assert sorted(counts[16:48]) == sorted(draw_counts("log", 32, 16))


def test_a_number_is_the_count_of_all_rows() -> None:
    assert draw_counts("8", 5, 16) == [8] * 5


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="counts must be log, uniform, sandwich or a number, got 'linear'"):
        draw_counts("linear", 8, 16)


def test_the_learning_rate_rises_then_falls() -> None:
    plan = Plan(steps=100, warmup=10)
    rates = [schedule(plan, step) for step in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.02)
    assert schedule(plan, 500) == pytest.approx(0.02)
