"""Which targets are met is said batch by batch."""

from typing import Any

from benchmarks.packed import report
from benchmarks.rounds import figures
from benchmarks.systems.system import Rates
from benchmarks.targets import IK, Ratio, Target, line, met, ratio, ratios, shown

TARGET = Target("decode", "decode", "moedial", IK, (1.3, 1.3, 1.5, 2.5))


def rows(speeds: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """Rows of a model with these speeds by system and batch, of one run each."""
    shared = {"model": "olmoe-0.9b-random", "num_experts": 8, "weights": "bf16", "file": ""}
    return [
        shared | figures([Rates(1.0, speed)]) | {"system": name, "batch": batch, "ours": name.startswith("moedial")}
        for name, found in speeds.items()
        for batch, speed in found.items()
    ]


def test_the_best_peer_counts() -> None:
    found = rows({"moedial": {1: 130, 4: 260}, IK[0]: {1: 50, 4: 100}, IK[2]: {1: 100}})
    assert ratios(found, TARGET) == {1: Ratio(1.3, (1.3,)), 4: Ratio(2.6, (2.6,))}
    assert line(found, TARGET) == ["decode", "1 / 4", "1.3 / 1.3", "1.30 / 2.60", "– / –", "met"]


def test_targets_are_held_against_medians_and_rounds_are_compared_in_turn() -> None:
    """A slow spell that hits both systems of a round leaves its ratio as it is."""
    ours, theirs = rows({"moedial": {1: 0}, IK[0]: {1: 0}})
    ours |= figures([Rates(1.0, speed) for speed in (130, 65, 140)])
    theirs |= figures([Rates(1.0, speed) for speed in (100, 50, 100)])
    assert (ours["decode"], theirs["decode"]) == (130, 100)
    assert ratio(ours, theirs, "decode") == Ratio(1.3, (1.3, 1.3, 1.4))
    assert line([ours, theirs], TARGET)[-3:] == ["1.30", "1.30–1.40", "met"]
    theirs |= figures([Rates(1.0, 200)])  # it failed in the second round
    assert ratio(ours, theirs, "decode") == Ratio(0.65, (0.65,))


def test_counts_are_not_mixed() -> None:
    """A peer that could not run the largest count is not held against ours at it."""
    found = rows({"moedial": {1: 100}, IK[0]: {1: 100}, IK[1]: {1: 10}})
    found[1]["num_experts"] = 4
    assert ratios(found, TARGET) == {1: Ratio(10.0, (10.0,))}


def test_where_a_target_is_missed_is_said() -> None:
    found = rows({"moedial": {1: 129, 4: 260}, IK[0]: {1: 100, 4: 100}})
    assert line(found, TARGET)[-1] == "not met at 1"
    assert line(rows({"moedial": {1: 129}, IK[0]: {1: 100}}), TARGET)[-1] == "not met"


def test_results_are_shown_by_their_kind() -> None:
    found = rows({"moedial": {1: 100}, "llama.cpp bf16": {1: 50}})
    assert "**olmoe-0.9b-random, decode, tokens/s, one run**" in shown({"rows": found})
    lines = met(found).splitlines()
    assert len(lines) == 3, "other targets were not measured"
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells == ["olmoe-0.9b", "bf16, prefill, against llama.cpp", "1", "3.3", "1.00", "–", "not met"]
    counts = [{"num_experts": count, "tokens_per_s": 10.0, "read_gb": 0.05} for count in (8, 4, 2, 1)]
    packed = [
        {"model": "packed", "start_s": 1.0, "process_gb": 0.3, "gigabytes": 3.4, "counts": counts},
        {"model": "half", "start_s": 1, "process_gb": 0.3, "limit_gb": 1.7, "disk_gb_s": 1.0, "counts": counts},
    ]
    assert "| 8   |     10.0 |             50.0 |                  20.0 |     50% |" in report(packed)
    assert shown({"rows": packed}) == report(packed)
