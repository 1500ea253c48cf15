"""Progress without a terminal: a line now and then, with the time left at the pace of what was really computed."""

import time
from io import StringIO

import pytest
from rich.console import Console

from calibration import progress
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


def test_at_a_terminal_there_is_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    with Progress().stage("scoring", 4) as stage:
        stage.advance()
        stage.advance()
    shown = screen.getvalue()
    assert "scoring" in shown and "2/4" in shown
    assert shown.count("0:00:00") + shown.count("-:--:--") >= 2  # passed, and left
