"""Progress without a terminal: a line now and then, with the time left at the pace of what was really computed."""

import time

import pytest

from calibration.progress import Progress, Stage


def test_lines_come_with_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Progress().stage("scoring", 100) as stage:
        for _ in range(50):
            stage.advance(computed=False)  # as they were done before
        for _ in range(10):
            now += 1.0
            stage.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["scoring: 56 of 100, 44 s left"]


def test_a_stage_that_has_computed_nothing_yet_has_an_estimate() -> None:
    assert Stage("scoring", 3).seconds_left() >= 0
