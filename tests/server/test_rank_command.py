"""`moedial rank`: what it starts, and what it refuses."""

import os
import sys

import pytest

from server.cli import rank
from server.configuration.variables import BadSetting


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that take the place of this process."""
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda _, command, environment: commands.append(command))
    return commands


def test_the_rank_process_takes_the_place_of_the_command(started: list[list[str]]) -> None:
    rank("./model", join="10.0.0.1:29500", number=2, device="cuda:1")
    start = [sys.executable, "-m", "engine.ranks.rank", "10.0.0.1:29500", "2"]
    assert started == [[*start, "--model", "./model", "--device", "cuda:1"]]


def test_torchruns_variables_say_where_rank_0_is(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    rank(number=1)
    assert started[0][3:] == ["10.0.0.1:29500", "1"]


def test_a_rank_without_an_address_or_number_is_refused(started: list[list[str]]) -> None:
    with pytest.raises(BadSetting, match="--join is 'host', not HOST:PORT"):
        rank(join="host", number=1)
    with pytest.raises(BadSetting, match="--rank is 0, must be at least 1; rank 0 is moedial serve --ranks"):
        rank(join="10.0.0.1:29500")
    assert not started
