"""`routed_pairs` in usage and metrics: the engine's figure, summed over a call, and that of the trained count."""

from typing import Any

import orjson
import pytest

from tests.server.fakes import INFO, STATS, FakeEngine, says
from tests.server.harness import CHAT, COMPLETIONS, frames, in_memory

TRAINED = STATS.computed_tokens * INFO.experts.trained * INFO.experts.layers


def test_a_call_has_the_sum_of_its_sequences() -> None:
    with in_memory() as client:
        answer = client.post(COMPLETIONS, json={"prompt": ["a", "b"], "n": 2, "num_experts": 2}).json()
    expected = {"routed_pairs": 4 * STATS.routed_pairs, "routed_pairs_trained": 4 * TRAINED}
    for figures in (answer["usage"], answer["metrics"]):
        assert {name: figures[name] for name in expected} == expected


@pytest.mark.parametrize("experts", [{"count": 2}, {"count": [1, 2, 6]}, {"prefill": 8, "decode": [1, 2, 6]}])
def test_a_stream_that_a_stop_string_ends_counts_what_was_computed(experts: Any) -> None:
    """The engine's last word came with the first token; each one since was computed from the one before it."""
    engine = FakeEngine(says("abc-STOP-and much more"))
    engine.first_stats = True
    body = {"messages": [{"role": "user", "content": "hi"}], "stop": "-STOP-", "experts": experts}
    with in_memory(engine) as client:
        text = client.post(CHAT, json=body | {"stream": True, "stream_options": {"include_usage": True}}).text
    usage = orjson.loads(frames(text)[-2])["usage"]
    count = experts.get("count") or experts["decode"]
    per_token = sum(count) if isinstance(count, list) else count * INFO.experts.layers
    later = len("abc-STOP-") - 1
    assert usage["routed_pairs"] == STATS.routed_pairs + later * per_token
    assert usage["routed_pairs_trained"] == TRAINED + later * INFO.experts.trained * INFO.experts.layers


def test_where_the_work_depends_on_the_token_later_tokens_count_at_the_mean_so_far() -> None:
    engine = FakeEngine(says("abc-STOP-and much more"))
    engine.first_stats = True
    body = {"prompt": "hi", "stop": "-STOP-", "experts": {"count": 2, "reuse": 3}, "max_tokens": 64}
    with in_memory(engine) as client:
        usage = client.post(COMPLETIONS, json=body).json()["usage"]
    later = len("abc-STOP-") - 1
    assert usage["routed_pairs"] == STATS.routed_pairs + later * STATS.routed_pairs // STATS.computed_tokens
    assert usage["routed_pairs"] != STATS.routed_pairs + later * 2 * INFO.experts.layers
