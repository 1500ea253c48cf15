"""`usage.cost` over HTTP, by hand: tokens times prices, in answers of every kind, in /v1/models and in the metrics."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec import structs
from starlette.testclient import TestClient

from tests.server.fakes import EOS, STATS, FakeEngine
from tests.server.harness import CHAT, COMPLETIONS, eventually, frames, in_memory, service_of, value

PRICES = "1=10/20/1,4=40/80,8=80/400/8"
ANSWER = len("abcd") + 1  # tokens
PROMPT = len("hello")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[TestClient, FakeEngine]]:
    engine = FakeEngine()
    with in_memory(engine, prices=PRICES, currency="credits") as client:
        yield client, engine


@pytest.fixture
def engine(server: tuple[TestClient, FakeEngine]) -> FakeEngine:
    engine = server[1]
    engine.script, engine.stats = (lambda _: [*b"abcd", EOS]), STATS
    return engine


@pytest.fixture
def client(server: tuple[TestClient, FakeEngine], engine: FakeEngine) -> TestClient:
    return server[0]


def usage(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post(COMPLETIONS, json={"prompt": "hello"} | fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["usage"]
    return found


def millionths(found: dict[str, Any]) -> float:
    """The cost, in millionths: a token at a price of 1."""
    details = found["cost_details"]
    assert details["prompt_cost"] + details["completion_cost"] == pytest.approx(found["cost"])
    assert details["currency"] == "credits"
    return float(found["cost"]) * 1e6


def test_the_cost_follows_the_count(client: TestClient) -> None:
    assert millionths(usage(client, num_experts=1)) == pytest.approx(10 * PROMPT + 20 * ANSWER)
    assert millionths(usage(client)) == pytest.approx(40 * PROMPT + 80 * ANSWER)
    assert millionths(usage(client, model="tiny@k2")) == pytest.approx(20 * PROMPT + 40 * ANSWER)


def test_prompt_and_answer_have_their_own_counts(client: TestClient) -> None:
    found = usage(client, experts={"prefill": 8, "decode": 1})
    assert millionths(found) == pytest.approx(80 * PROMPT + 20 * ANSWER)


def test_layers_of_different_counts_cost_as_their_mean(client: TestClient) -> None:
    found = usage(client, experts={"count": [4, 8, 6]})
    assert found["num_experts"] == 6 and millionths(found) == pytest.approx(60 * PROMPT + 240 * ANSWER)


def test_cached_tokens_have_a_price_of_their_own(client: TestClient, engine: FakeEngine) -> None:
    engine.stats = structs.replace(STATS, cached_tokens=3)
    found = usage(client, num_experts=8)
    assert found["prompt_tokens_details"]["cached_tokens"] == 3
    assert millionths(found) == pytest.approx(80 * (PROMPT - 3) + 8 * 3 + 400 * ANSWER)


def test_where_the_work_depends_on_the_token_what_ran_is_priced(client: TestClient, engine: FakeEngine) -> None:
    engine.stats = structs.replace(STATS, computed_tokens=10, routed_pairs=75, trained_pairs=120)
    found = usage(client, experts={"count": 4, "threshold": 0.1})
    assert found["num_experts"] == 2.5 and millionths(found) == pytest.approx(25 * PROMPT + 50 * ANSWER)


def test_a_prompt_is_paid_once_for_all_its_answers(client: TestClient) -> None:
    found = usage(client, n=3, num_experts=1)
    assert millionths(found) == pytest.approx(10 * PROMPT + 3 * 20 * ANSWER)


def test_a_cascade_costs_both_runs(client: TestClient) -> None:
    found = usage(client, experts={"cascade": {"low": 1, "high": 8, "threshold": 0.5}})
    assert millionths(found) == pytest.approx((10 + 80) * PROMPT + (20 + 400) * ANSWER)


def test_streams_and_responses_have_it(client: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": [{"role": "user", "content": "hello"}], "num_experts": 1}
    whole = client.post(CHAT, json=body).json()["usage"]
    text = client.post(CHAT, json=body | {"stream": True, "stream_options": options}).text
    usages = [json.loads(frame)["usage"] for frame in frames(text)[:-1]]
    assert usages[-1] == whole
    costs = [one["cost"] for one in usages]
    assert costs == sorted(costs) and len({*costs}) > 3, "it grows with the answer"
    answer = client.post("/v1/responses", json={"input": "hello", "num_experts": 1}).json()["usage"]
    assert (answer["cost"], answer["cost_details"]) == (whole["cost"], whole["cost_details"])


def test_metrics_count_it_by_count(client: TestClient) -> None:
    service = service_of(client)
    read = lambda count: value(service, "cost_total", num_experts=count)  # noqa: E731
    before = read("1"), read("8")
    spent = usage(client, num_experts=1)["cost"]
    assert read("1") - before[0] == pytest.approx(spent)
    usage(client, experts={"cascade": {"low": 1, "high": 8, "threshold": 0.5}})
    assert read("1") - before[0] == pytest.approx(2 * spent)
    assert read("8") - before[1] == pytest.approx((80 * PROMPT + 400 * ANSWER) / 1e6)


def test_what_was_used_counts_also_where_the_request_failed(client: TestClient, engine: FakeEngine) -> None:
    service = service_of(client)
    before = value(service, "cost_total", num_experts="1")
    engine.fail_at = {"-0": (2, "broken")}
    assert client.post(COMPLETIONS, json={"prompt": "hello", "num_experts": 1}).status_code == 500
    engine.fail_at = {"-0": (0, "broken")}
    assert client.post(COMPLETIONS, json={"prompt": "hello", "num_experts": 1}).status_code == 500
    engine.fail_at = {}
    eventually(lambda: value(service, "cost_total", num_experts="1") > before)
    assert value(service, "cost_total", num_experts="1") - before == pytest.approx((10 * PROMPT + 20 * 2) / 1e6)


def test_models_show_the_prices(client: TestClient) -> None:
    for model in client.get("/v1/models").json()["data"]:
        prices = model["meta"]["moe"]["prices"]
        assert prices["currency"] == "credits"
        assert [row["num_experts"] for row in prices["per_million_tokens"]] == [1, 4, 8]


def test_without_prices_nothing_is_said_of_cost() -> None:
    with in_memory() as client:
        assert not {"cost", "cost_details"} & usage(client).keys()
        assert "prices" not in client.get("/v1/models/tiny").json()["meta"]["moe"]
        assert value(service_of(client), "cost_total") == 0
