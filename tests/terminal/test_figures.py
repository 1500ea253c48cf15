"""Statistics: percentiles as numpy's, speeds by the server's token counts, failures counted and in no latency."""

from dataclasses import replace

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from terminal.bench import figures
from terminal.bench.load import RunResult
from terminal.bench.outcome import Recorder, RequestOutcome
from terminal.bench.plan import PlannedRequest
from terminal.errors import Refused, StreamFailed
from tests.terminal.scripted_server import DONE, delta, ending, event

GOOD = RequestOutcome(4, 10.0, 12.0, 0.0, (10.5, 11.0, 11.5), 7, 0, 9, 4, None)
BAD = replace(GOOD, failure=Refused("the queue is full", "HTTP 503 queue_full"), ended=99.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    expected = float(numpy.percentile(values, share * 100))
    assert figures.percentile(sorted(values), share) == pytest.approx(expected, abs=1e-6)


def test_spread() -> None:
    assert figures.summary([3.0, 1.0, 2.0]) == {"n": 3, "mean": 2.0, "p50": 2.0, "p90": 2.8, "p99": 2.98}
    assert figures.summary([]) == {"n": 0, "mean": None, "p50": None, "p90": None, "p99": None}


def test_one_request() -> None:
    assert figures.series([GOOD], "ttft_ms") == [500.0]
    assert figures.series([GOOD], "itl_ms") == [500.0, 500.0]
    assert figures.series([GOOD], "e2e_ms") == [2000.0]
    assert figures.series([GOOD], "stream_tokens_per_second") == [8.0]  # nine tokens in three events: eight in a second


def test_no_speed_where_all_came_at_once() -> None:
    assert replace(GOOD, arrivals=(10.5,)).speed is None and replace(GOOD, tokens=1).speed is None


def test_failures_are_counted_and_in_no_other_figure() -> None:
    found = figures.rows(RunResult([GOOD, BAD, replace(GOOD, count=None), replace(GOOD, count=1)], 2.0, 0.1))
    assert [row["num_experts"] for row in found] == [1, 4, "default", "all"]
    four, everything = found[1], found[3]
    assert (four["requests"], four["ok"], four["errors"]) == (2, 1, {"HTTP 503 queue_full": 1})
    assert four["e2e_ms"]["n"] == 1 and four["itl_ms"]["n"] == 2 and four["tokens_per_second"] == 4.5
    assert everything["completion_tokens"] == 27 and everything["tokens_per_second"] == 13.5
    assert figures.examples([GOOD, BAD]) == {"HTTP 503 queue_full": "the queue is full"}


def test_doubts() -> None:
    assert figures.warnings(RunResult([GOOD], 1.0, 0.1), RunResult([], 1.0, 0.0)) == []
    found = figures.warnings(RunResult([replace(GOOD, late=0.5, cached=7)], 1.0, 0.95), RunResult([BAD], 1.0, 0.0))
    words = ("warm-up", "100% of the prompt tokens", "95%", "500 ms")
    assert all(word in line for word, line in zip(words, found, strict=True))


def recorder() -> Recorder:
    return Recorder(PlannedRequest(0, 4, None, 0, None, 0), 0.0)


def test_only_events_with_text_are_counted() -> None:
    told = recorder()
    text = event({"choices": [{"index": 0, "text": "a"}]})
    silent = event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
    for part in (delta(role="assistant", content=""), delta(content="b"), text, delta(reasoning_content="c"), silent):
        told.feed(part)
        told.end_read()
    told.feed(ending(completion_tokens=40, prompt_tokens_details={"cached_tokens": 2}))
    outcome = told.finish()
    assert (outcome.prompt_tokens, outcome.cached) == (3, 2)
    assert len(outcome.arrivals) == 3 and outcome.tokens == 40 and outcome.used == 4 and outcome.failure is None
    assert outcome.began <= outcome.arrivals[0] <= outcome.ended


def test_what_one_read_brings_is_one_arrival() -> None:
    told = recorder()
    told.feed(delta(role="assistant", content=""))
    for _ in range(2):
        told.feed(delta(content="b") + delta(content="c"))
        told.feed(delta(content="d"))
        told.end_read()
    told.feed(ending(completion_tokens=6))
    outcome = told.finish()
    assert len(outcome.arrivals) == 2 and outcome.tokens == 6


def test_tokens_are_not_guessed() -> None:
    told = recorder()
    told.feed(delta(content="b") + DONE)
    with pytest.raises(StreamFailed, match="without usage"):
        told.finish()
