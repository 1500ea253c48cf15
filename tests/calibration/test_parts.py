"""The smaller parts: the grid of counts, windows of text, work from shapes, and times in turns."""

import time
from pathlib import Path

import pytest

from calibration import speed
from calibration.counts import grid
from calibration.partial import Partial
from calibration.progress import Progress
from calibration.speed import Clock
from calibration.texts import read_texts, split
from calibration.work import DecoderWork, Weights
from model.budget import ExpertBudget
from model.decoder import parameter_count
from model.errors import CheckpointError, InvalidRequest
from model.expert_range import ExpertRange
from model.options import Quantize, QuantizeLayers
from tests.calibration.checkpoints import two_experts, write_text
from tests.model.tiny import decoder, infinity, llama_like, topk
from weights.sizes import BytesPerWeight
from weights.tokenizer import Tokenizer


def test_the_grid_has_all_small_counts_then_doubles_and_always_the_trained_one() -> None:
    assert grid(ExpertRange(2, 2, 1, 8), ()) == (1, 2, 3, 4, 5, 6, 7, 8)
    assert grid(ExpertRange(2, 6, 1, 60), ()) == (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 60)
    assert grid(ExpertRange(2, 20, 1, 64), ()) == (1, 2, 3, 4, 5, 6, 7, 8, 16, 20, 32, 64)
    assert grid(ExpertRange(2, 4, 1, 8), (8, 1)) == (1, 4, 8)
    assert grid(ExpertRange(2, 4, 4, 4), ()) == (4,)
    with pytest.raises(InvalidRequest, match="--counts must be between 1 and 8"):
        grid(ExpertRange(2, 4, 1, 8), (9,))


def test_the_two_parts_of_a_text_share_no_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(two_experts(tmp_path / "model"))
    text = write_text(tmp_path / "text.txt")
    windows = read_texts([text], tokenizer, 50, 1000)
    assert len(windows[0]) == 20
    assert all(len(window) == 51 for window in windows[0])
    decide, report = split(windows)
    assert len(decide.windows) == 5 and len(report.windows) == 15
    assert decide.windows + report.windows == tuple(windows[0])
    joined = [token for window in windows[0] for token in window[:-1]]
    assert joined[0] == joined[101] == 0  # each document begins with the end-of-text token
    assert 1 not in joined  # none of the separators became text


def test_each_file_has_its_share_of_both_parts(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(two_experts(tmp_path / "model"))
    paths = [write_text(tmp_path / "a.txt"), write_text(tmp_path / "b.txt", words=1200)]
    decide, report = split(read_texts(paths, tokenizer, 50, 800))
    assert (len(decide.windows), len(report.windows)) == (4, 12)


def test_a_text_that_is_too_short_or_unreadable_is_refused_by_name(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(two_experts(tmp_path / "model"))
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("once upon a time")
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"short.txt has 5 tokens; at least 101 are needed"):
        read_texts([short], tokenizer, 50, 1000)
    with pytest.raises(CheckpointError, match=r"binary.txt cannot be read"):
        read_texts([binary], tokenizer, 50, 1000)


def test_at_all_experts_a_token_reads_the_whole_model() -> None:
    """Of an untied embedding, one row."""
    config = llama_like(topk(), topk())
    weights = parameter_count(decoder(config)) - config.width * (config.vocabulary - 1)
    work = DecoderWork.of(config)
    assert work.bytes_per_token((6, 6), Weights(2, 2)) == 2 * weights
    assert work.flops_per_token((6, 6)) == 2 * weights
    expert = 3 * 24 * 12
    assert work.bytes_per_token((1, 6), Weights(2, 2)) == 2 * (weights - 5 * expert)
    stored = Weights.of(BytesPerWeight(0.5, 1.5), "none", "experts")  # quantised in the checkpoint
    assert work.bytes_per_token((6, 6), stored) == 1.5 * weights - 12 * expert
    loaded, int4 = BytesPerWeight(2, 2), 0.5 + 1 / 32 + 4 / 4096  # a code, a group's scale, an output's factor
    cases: list[tuple[Quantize, QuantizeLayers, float]] = [
        ("int8", "experts", 2 * weights - 12 * expert),
        ("int8", "all", weights),
        ("int4", "experts", weights - 12 * expert * (1 - int4)),
        ("int4", "all", weights * int4),
    ]
    for quantize, layers, expected in cases:
        found = work.bytes_per_token((6, 6), Weights.of(loaded, quantize, layers))
        assert found == pytest.approx(expected)


def test_draws_read_the_groups_that_they_keep() -> None:
    config = llama_like(infinity())
    work = DecoderWork.of(config)
    kept = 3 * 4 * 2 * 24  # groups of a draw, units of a group, both matrices
    one, two, all_of_them = (work.bytes_per_token((count,), Weights(1, 1)) for count in (1, 2, 8))
    assert two - one == kept
    assert all_of_them == parameter_count(decoder(config)) - config.width * (config.vocabulary - 1)
    assert work.flops_per_token((2,)) - work.flops_per_token((1,)) == 2 * (kept + 12 * 6)  # the scores of one draw more


@pytest.mark.parametrize(("seconds", "rounds"), [(0, speed.MIN_ROUNDS), (90, 9), (10**6, speed.MAX_ROUNDS)])
def test_budgets_are_timed_in_turns_and_their_medians_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int
) -> None:
    """A round of two budgets takes ten seconds; of the two an early step and then one in ten rounds is far slower."""
    asked: list[ExpertBudget] = []
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def timed(self: Clock, budget: ExpertBudget) -> dict[str, float]:
        nonlocal now
        asked.append(budget)
        now += 5.0
        value = 90.0 if len(asked) % 10 == 1 else float(budget.per_layer[0])
        return {"1": value, "16": 4 * value, "prefill": value / 10}

    monkeypatch.setattr(Clock, "round", timed)
    one, two = ExpertBudget((1,)), ExpertBudget((2,))
    partial = Partial(tmp_path / "partial", {})
    clock = Clock(None, 10, 64)  # type: ignore[arg-type]
    fast, slow = speed.measure(clock, [one, two], seconds, partial, Progress())
    assert asked == [one, two, *[one, two] * rounds]
    assert fast.itl_ms == {"1": 1000.0, "16": 4000.0} and slow.itl_ms["1"] == 2000.0
    assert fast.tokens_per_second == {"1": 1.0, "16": 4.0}
    assert slow.prefill_tokens_per_second == pytest.approx(5.0)
    speed.measure(clock, [one, two], seconds, partial, Progress())
    assert len(asked) == 2 + 2 * rounds  # all kept
