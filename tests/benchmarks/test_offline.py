"""Rounds of the offline benchmark: every system in turn, each round's figures kept, their medians told."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.offline import bench, chosen
from benchmarks.results import finish
from benchmarks.rounds import Rounds
from benchmarks.systems.system import PeerFailed, Rates, Weights
from benchmarks.targets import shown


class Invented:
    """A system whose decoding speeds are given, round by round; it fails when they are used up."""

    weights: Weights = "bf16"
    file = ""

    def __init__(self, name: str, turns: list[str], speeds: Sequence[float]) -> None:
        self.name = name
        self._turns = turns
        self._speeds = iter(speeds)

    def version(self) -> str:
        return "1"

    def refuses(self, config: dict[str, Any]) -> str | None:
        return None

    @contextmanager
    def open(self, folder: Path, count: int) -> Iterator["Invented"]:
        yield self

    def warm_up(self) -> None:
        self._turns.append(f"{self.name} warms up")

    def run(self, batches: Sequence[int]) -> dict[int, Rates]:
        self._turns.append(self.name)
        for speed in self._speeds:
            return {batch: Rates(10 * speed, batch * speed) for batch in batches}
        raise PeerFailed("no more")


def test_medians_of_rounds_in_which_systems_take_turns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    turns: list[str] = []
    systems = [Invented("a", turns, (5, 9, 1)), Invented("b", turns, (2, 4))]
    a1, a4, b1, _ = (asdict(row) for row in bench("model", Path(), systems, [1, 4], [2], Rounds(3, 60)))
    assert turns == 3 * ["a warms up", "a", "b warms up", "b"]
    assert "b is out: no more" in capsys.readouterr().out
    assert (a1["prefill"], a4["decode"], b1["decode"]) == (50, 20, 3)
    assert a4["runs"] == [{"prefill": 10 * speed, "decode": 4 * speed} for speed in (5, 9, 1)]
    assert [run["decode"] for run in b1["runs"]] == [2, 4]
    finish({"rows": [a1, b1]}, tmp_path / "out.json")
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept == {"rows": [a1, b1]}
    assert json.loads(capsys.readouterr().out) == kept
    assert "model, decode, tokens/s, medians of 2 to 3 runs" in shown(kept)
    assert "| 1, 2     | 1–9 | 2–4 |" in shown(kept)


def test_no_round_begins_after_the_minutes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter((0.0, 59.0, 61.0, 0.0))
    monkeypatch.setattr("benchmarks.rounds.time.monotonic", lambda: next(clock))
    assert list(Rounds(5, 1)) == [0, 1]
    assert "stopped after 2 of 5 rounds: over 1 minutes" in capsys.readouterr().out
    assert list(Rounds(1, 0)) == [0], "the first always runs"


def test_a_system_that_is_asked_for_twice_is_measured_once() -> None:
    names = [system.name for system in chosen("llamacpp-bf16,llamacpp-q4_0", "int4", "q4_0")]
    assert names == ["moedial", "moedial int4", "moedial q4_0 file", "llama.cpp q4_0", "llama.cpp bf16"]
