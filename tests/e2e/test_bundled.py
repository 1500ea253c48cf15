"""The whole product over real HTTP: `moedial serve` with the bundled models, with the real `openai` client."""

import math
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.e2e.live import Live, serving
from weights.folder import DEFAULT, compared_models

PROMPT = "Once upon a time, there was a little"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving("--max-running", "4", "--queue-size", "4", "--threads", "1") as server:
        yield server
        assert_drains(server, DEFAULT)


def complete(live: Live, **body: Any) -> openai.types.Completion:
    values = {"model": DEFAULT, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "seed": 1} | body
    return live.client.completions.create(**values)


@pytest.mark.parametrize("count", [1, 8])
def test_a_count_changes_work_and_is_echoed(live: Live, count: int) -> None:
    before = live.metric("routed_pairs_total")
    answer = complete(live, extra_body={"num_experts": count}, prompt=f"{PROMPT} {count}")
    assert answer.usage is not None and answer.usage.model_extra is not None
    assert answer.usage.model_extra["num_experts"] == count
    assert answer.choices[0].text.strip()
    layers = live_model(live)["meta"]["moe"]["layers"]
    computed = answer.usage.prompt_tokens + answer.usage.completion_tokens - 1
    assert live.metric("routed_pairs_total") - before == computed * layers * count


def live_model(live: Live) -> dict[str, Any]:
    return httpx.get(f"{live.url}/v1/models/{DEFAULT}").json()


def test_three_ways_to_ask_give_one_answer(live: Live) -> None:
    body = complete(live, extra_body={"num_experts": 2})
    alias = complete(live, model=f"{DEFAULT}@k2")
    header = complete(live, extra_headers={"X-Num-Experts": "2"})
    assert body.choices[0].text == alias.choices[0].text == header.choices[0].text


@pytest.mark.parametrize(("threshold", "returned"), [(0.0, "low"), (1.0, "high")])
def test_a_cascade_is_the_plain_answer_at_one_of_its_counts(live: Live, threshold: float, returned: str) -> None:
    """And what was measured is what log-probabilities say: the margin needs the two best tokens alone."""
    cascade = {"low": 1, "high": 4, "by": "margin", "threshold": threshold}
    seeded: dict[str, Any] = {"temperature": 0.9, "seed": 3, "logprobs": 2}
    answer = complete(live, **seeded, extra_body={"experts": {"cascade": cascade}})
    plain = {name: complete(live, **seeded, extra_body={"num_experts": cascade[name]}) for name in ("low", "high")}
    assert answer.choices[0].text == plain[returned].choices[0].text
    assert logprobs_of(answer) == logprobs_of(plain[returned])
    assert logprobs_of(plain["low"]) != logprobs_of(plain["high"])
    assert answer.usage is not None and answer.usage.model_extra is not None
    (decided,) = answer.usage.model_extra["cascade"]["answers"]
    assert decided["returned"] == returned
    assert decided["low"] == pytest.approx(mean_margin(plain["low"]), abs=1e-4)
    assert decided["high"] == (pytest.approx(mean_margin(plain["high"]), abs=1e-4) if returned == "high" else None)


def logprobs_of(answer: openai.types.Completion) -> list[float | None] | None:
    logprobs = answer.choices[0].logprobs
    return None if logprobs is None else logprobs.token_logprobs


def mean_margin(answer: openai.types.Completion) -> float:
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs is not None
    best = [sorted(map(math.exp, top.values()))[::-1][:2] for top in logprobs.top_logprobs]
    return sum(first - second for first, second in best) / len(best)


def test_streaming_says_the_same(live: Live) -> None:
    whole = complete(live, extra_body={"num_experts": 4}).choices[0].text
    chunks = live.client.completions.create(
        model=DEFAULT, prompt=PROMPT, max_tokens=12, temperature=0, seed=1, stream=True, extra_body={"num_experts": 4}
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole


def test_chat(live: Live) -> None:
    answer = live.client.chat.completions.create(
        model=DEFAULT, messages=[{"role": "user", "content": "Tell me a story."}], max_tokens=16, seed=3
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content


def test_sampling_repeats_with_its_seed(live: Live) -> None:
    texts = {complete(live, temperature=1, seed=11, extra_body={"num_experts": 3}).choices[0].text for _ in range(3)}
    others = {complete(live, temperature=1, seed=seed).choices[0].text for seed in (12, 13, 14)}
    assert len(texts) == 1 and len(others) > 1


def test_without_a_seed_the_coldest_answer_repeats_and_prompts_are_shared(live: Live) -> None:
    prompt = f"{PROMPT} girl who had a very big red ball and a very small blue kite. She"
    first = complete(live, prompt=prompt, seed=None)
    found = live.metric("prefix_cache_hits_total")
    second = complete(live, prompt=prompt, seed=None)
    assert second.choices[0].text == first.choices[0].text
    assert live.metric("prefix_cache_hits_total") - found >= 16


def test_equal_prompts_of_a_list_are_drawn_apart(live: Live) -> None:
    answers = complete(live, prompt=[PROMPT] * 4, seed=None, temperature=1, max_tokens=16).choices
    assert len({answer.text for answer in answers}) > 1


def test_many_requests_with_other_counts_changes_nothing(live: Live) -> None:
    alone = {k: complete(live, extra_body={"num_experts": k}, max_tokens=24).choices[0].text for k in (1, 2, 4, 8)}
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda k: complete(live, extra_body={"num_experts": k}, max_tokens=24), alone)
    assert [answer.choices[0].text for answer in answers] == list(alone.values())


@pytest.mark.parametrize("value", [0, -1, 17, 10**9, "8", 2.5, True, [], [1, 2], {"count": 2}])
def test_refused_counts_name_value_and_range(live: Live, value: object) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(live, extra_body={"num_experts": value})
    assert caught.value.param == "num_experts"
    assert "between 1 and 8" in str(caught.value) or "integer" in str(caught.value)


def test_refusals_of_other_fields(live: Live) -> None:
    for body, field in [
        ({"extra_body": {"num_expert": 2}}, "num_expert"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"n": 1_000_000}, "n"),
        ({"logprobs": 1_000_000}, "logprobs"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"prompt": [99_999]}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"model": f"{DEFAULT}@k2", "extra_body": {"num_experts": 3}}, "num_experts"),
    ]:
        with pytest.raises(openai.BadRequestError) as caught:
            complete(live, **body)
        assert caught.value.param == field, body
    with pytest.raises(openai.NotFoundError):
        complete(live, model="no-such-model")


def test_disconnect_frees_blocks(live: Live) -> None:
    aborted = live.metric("requests_aborted_total")
    body = {"model": DEFAULT, "prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{live.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()  # kept: a collected iterator would close the connection
        next(lines)
        assert live.metric("kv_cache_usage_perc") > 0
    assert live.settles("num_requests_running", 0) and live.settles("kv_cache_usage_perc", 0)
    assert live.metric("requests_aborted_total") == aborted + 1


def test_overflow_is_a_503_with_retry_after(live: Live) -> None:
    body = {"model": DEFAULT, "prompt": PROMPT, "max_tokens": 150, "ignore_eos": True, "n": 4}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: httpx.post(f"{live.url}/v1/completions", json=body, timeout=120), range(6)))
    codes = sorted(answer.status_code for answer in answers)
    assert codes[0] == 200 and codes[-1] == 503
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["message"]


def test_metrics_reconcile(live: Live) -> None:
    assert live.settles("num_requests_running", 0)
    names = (
        "request_success_total",
        "generation_tokens_total",
        "prompt_tokens_total",
        "time_to_first_token_seconds_count",
    )
    before = {name: live.metric(name, num_experts="2") for name in names}
    answers = [complete(live, extra_body={"num_experts": 2}) for _ in range(3)]
    usages = [answer.usage for answer in answers if answer.usage is not None]
    gained = {name: live.metric(name, num_experts="2") - before[name] for name in names}
    assert gained["request_success_total"] == gained["time_to_first_token_seconds_count"] == 3
    assert gained["generation_tokens_total"] == sum(usage.completion_tokens for usage in usages)
    assert gained["prompt_tokens_total"] == sum(usage.prompt_tokens for usage in usages)


def test_models_carry_quality_per_count(live: Live) -> None:
    moe = live_model(live)["meta"]["moe"]
    assert {row["num_experts"] for row in moe["quality"]} >= {1, 2, 4, 8}
    ids = [model.id for model in live.client.models.list()]
    assert ids[0] == DEFAULT and f"{DEFAULT}@k2" in ids


def engine_of(live: Live) -> psutil.Process:
    """The engine process among the server's children."""
    (child,) = [c for c in psutil.Process(live.process.pid).children() if "engine.process.worker" in c.cmdline()]
    return child


def test_the_engine_may_die_and_the_server_goes_on(live: Live) -> None:
    body = {"model": DEFAULT, "prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    failed = live.metric("requests_failed_total")
    with httpx.stream("POST", f"{live.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        engine_of(live).kill()
        rest = list(lines)
    assert any('"error"' in line for line in rest), "the stream ends with an error event, not in silence"
    probes = [httpx.get(f"{live.url}/{path}").status_code for path in ("ready", "health", "live")]
    assert probes == [503, 503, 200]
    assert live.settles("engine_up", 1, seconds=60)
    assert complete(live).choices[0].text
    assert live.metric("requests_failed_total") == failed + 1


def test_a_second_signal_stops_at_once_and_leaves_no_engine() -> None:
    with serving("--threads", "1") as server:
        child = engine_of(server)
        body = {"model": DEFAULT, "prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(10)
        child.wait(10)
        assert not child.is_running()


@pytest.mark.redundant  # the fixture's server drains at its end; `test_dial.py` asks every compared model
def test_every_compared_model_answers_and_drains() -> None:
    for name in compared_models():
        with serving("--model", name, "--threads", "1") as server:
            answer = server.client.completions.create(
                model=name, prompt=PROMPT, max_tokens=40, extra_body={"num_experts": 1}
            )
            assert answer.choices[0].text
            assert_drains(server, name)


def assert_drains(server: Live, name: str) -> None:
    """A request that is running when the server is told to stop still gets its whole answer."""
    body: dict[str, Any] = {"model": name, "prompt": PROMPT, "max_tokens": 100, "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.client.completions.create, **body)
        assert wait_for_running(server)
        server.process.send_signal(signal.SIGTERM)
        usage = running.result(60).usage
    assert usage is not None and usage.completion_tokens == 100
    assert server.process.wait(30) == 0


def wait_for_running(server: Live) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if server.metric("num_requests_running") > 0:
            return True
        time.sleep(0.01)
    return False
