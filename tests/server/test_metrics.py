"""Counters agree with what was sent, labels stay in their closed set, and step reports reach the engine series."""

import pytest

from model.budget import ExpertBudget
from model.errors import EngineDown
from server.generation.timeline import SharedPromptCount, Timeline
from server.metrics import Metrics
from tests.server.fakes import FakeEngine
from tests.server.harness import CHAT, COMPLETIONS, ended, in_memory, service_of, value


def test_counters_reconcile_with_what_was_sent() -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        usage = []
        for i in range(1, 9):
            body = {"prompt": "x" * i, "num_experts": i, "max_tokens": 4 if i % 2 else 50}
            usage.append(client.post(COMPLETIONS, json=body).json()["usage"])
        client.post(COMPLETIONS, json={"prompt": "hi", "num_experts": 99})
        client.post(COMPLETIONS, json={"prompt": "hi", "model": "other"})
        client.post(CHAT, content=b"{", headers={"content-type": "application/json"})
        client.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 2})
        service = service_of(client)
    success = {reason: value(service, "request_success_total", finished_reason=reason) for reason in ("stop", "length")}
    assert success == {"stop": 6, "length": 4} and ended(service) == 13
    for reason in ("invalid_value", "model_not_found", "invalid_json"):
        assert value(service, "requests_rejected_total", reason=reason) == 1
    generated = sum(u["completion_tokens"] for u in usage) + 24
    assert value(service, "generation_tokens_total") == generated
    assert value(service, "prompt_tokens_total") == sum(u["prompt_tokens"] for u in usage) + len(
        engine.seen[-1].prompt
    )  # which both answers share
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
        assert value(service, f"{name}_seconds_count") == 10
    assert value(service, "inter_token_latency_seconds_count") == generated - 10
    assert value(service, "request_num_experts_count") == 10
    labels = {k: value(service, "request_success_total", num_experts=k) for k in ("1", "2", "4", "8", "other")}
    assert labels == {"1": 1, "2": 1, "4": 3, "8": 1, "other": 4}


def test_an_alias_that_is_not_listed_adds_no_label() -> None:
    with in_memory() as client:
        for count in range(1, 9):
            assert client.post(COMPLETIONS, json={"model": f"tiny@k{count}", "prompt": "hi"}).status_code == 200
        service = service_of(client)
    labels = {k: value(service, "request_success_total", num_experts=k) for k in ("1", "2", "4", "8", "other")}
    assert labels == {"1": 1, "2": 1, "4": 1, "8": 1, "other": 4}


def test_counts_by_phase_have_no_label_of_their_own_and_are_observed_as_their_mean() -> None:
    with in_memory() as client:
        for experts in ({"prefill": 8, "decode": 2}, {"prefill": 2, "decode": 2}, {"prefill": 8}, {"decode": 4}):
            assert client.post(COMPLETIONS, json={"prompt": "hi you", "experts": experts}).status_code == 200
        service = service_of(client)
    labels = {k: value(service, "request_success_total", num_experts=k) for k in ("2", "4", "8", "other")}
    assert labels == {"2": 1, "4": 1, "8": 0, "other": 2}
    means = [(6 * prefill + 12 * decode) / 18 for prefill, decode in ((8, 2), (2, 2), (8, 4), (4, 4))]
    assert value(service, "request_num_experts_sum") == pytest.approx(sum(means))


def test_what_was_refused_has_no_expert_count() -> None:
    """Here: more prompt tokens than there is room for, a grammar that the engine refuses, a lost engine."""
    engine = FakeEngine()
    with in_memory(engine, max_queued_tokens=100) as client:
        for body in ({"prompt": "x" * 60, "n": 2}, {"prompt": "hi", "guided_regex": "refused"}):
            assert client.post(COMPLETIONS, json=body).status_code == 400
        engine.fail_at["-0"] = (0, EngineDown("the engine is lost"))
        assert client.post(COMPLETIONS, json={"prompt": "hi"}).status_code == 503
        service = service_of(client)
    assert value(service, "request_num_experts_count") == 0 == value(service, "prompt_tokens_total")
    assert ended(service) == 3


def test_a_prompt_is_counted_once_whichever_answer_comes_first() -> None:
    metrics, prompt = Metrics("tiny"), SharedPromptCount()
    timelines = [Timeline(metrics, ExpertBudget((2,)), 3, 0.5, prompt=prompt) for _ in range(3)]
    timelines[0].abort()
    for timeline in timelines[1:]:
        timeline.record_token(1.0)
        timeline.succeed("stop")
    assert [metrics._counters[name, timelines[0].label] for name in ("prompt_tokens", "generation_tokens")] == [3, 2]


def test_step_reports_feed_the_engine_series() -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        client.post(COMPLETIONS, json={"prompt": "hi", "num_experts": 1})
        service = service_of(client)
        steps = 12
        assert value(service, "routed_pairs_total") == 3 * steps
        assert value(service, "routed_pairs_saved_total") == 9 * steps
        assert value(service, "prefix_cache_hits_total") == 4 * steps
        assert value(service, "prefix_snapshots_displaced_total") == 2 * steps
        assert (value(service, "prefix_snapshots"), value(service, "prefix_snapshot_bytes")) == (3, 3000)
        assert value(service, "kv_cache_usage_perc") == 0.25 and value(service, "step_unique_experts") == 5
        assert value(service, "oldest_waiting_seconds") == 0.5
        assert value(service, "default_num_experts") == 4
        assert value(service, "step_time_over_estimate_count") == steps
        assert value(service, "step_time_over_estimate_sum") == pytest.approx(steps / 2)
        text = client.get("/metrics").text
    assert (
        'moedial:request_success_total{engine="0",finished_reason="stop",model_name="tiny",num_experts="1"} 1.0' in text
    )
    assert "_created" not in text


def test_a_token_that_is_heard_of_late_does_not_make_time_run_backwards() -> None:
    """What was held is stamped with when it was made, by a clock that wakes late."""
    metrics = Metrics("tiny")
    timeline = Timeline(metrics, ExpertBudget((2,)), prompt_tokens=3, arrived=0.5)
    for at in (1.0, 1.5, 1.2):
        timeline.record_token(at)
    gaps = metrics.histogram_buffer("inter_token_latency_seconds", timeline.label)
    assert gaps.sum == pytest.approx(0.5) and sum(gaps.counts) == 2
    assert (timeline.first_token_at, timeline.last_token_at, timeline.tokens) == (1.0, 1.5, 3)


def test_the_engine_process_and_both_processes_use_are_exported() -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        engine.restarts = 3
        text = client.get("/metrics").text
        service = service_of(client)
        assert value(service, "engine_restarts_total") == 3
        assert value(service, "engine_seconds_since_report") == 0.5
        for tail in ("resident_memory_bytes", "cpu_seconds_total", "open_fds", "start_time_seconds"):
            assert f"\nprocess_{tail} " in text and f"\nmoedial:engine_process_{tail} " in text
        engine.pid = None
        text = client.get("/metrics").text
        assert "\nprocess_open_fds " in text and "engine_process" not in text, "there is none now"


def test_gauges_are_of_the_process_that_runs_not_of_one_that_died() -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        service = service_of(client)
        assert client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2}).status_code == 200
        assert value(service, "num_requests_running") == 1 and value(service, "kv_cache_usage_perc") == 0.25
        engine.restarts += 1
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "oldest_waiting_seconds"):
            assert value(service, name) == 0
        assert client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2}).status_code == 200
        assert value(service, "num_requests_running") == 1
