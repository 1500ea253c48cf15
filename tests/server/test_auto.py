"""Options of a calibration over HTTP: by name, by tier, and chosen by the server at the load of the moment."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from model.budget import ExpertBudget
from tests.server.calibrations import calibration
from tests.server.fakes import FakeEngine, says
from tests.server.harness import (
    CHAT,
    COMPLETIONS,
    eventually,
    frames,
    in_background,
    in_memory,
    on_loopback,
    service_of,
)

K1, K4, COST2 = ExpertBudget((1, 1, 1)), ExpertBudget((4, 4, 4)), ExpertBudget((1, 1, 4))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with in_memory(engine, calibration=calibration()) as client:
        yield client


def asked(client: TestClient, experts: Any = None, status: int = 200, **fields: Any) -> Any:
    body = {"prompt": "hi"} | fields | ({} if experts is None else {"experts": experts})
    answer = client.post(COMPLETIONS, json=body)
    assert answer.status_code == status, answer.text
    return answer


def test_the_cheapest_option_of_a_quality_runs_and_is_reported(client: TestClient, engine: FakeEngine) -> None:
    answer = asked(client, {"auto": {"min_quality": 0.9}})
    assert engine.seen[-1].budget == COST2, "as cheap as k2, and better"
    usage, metrics = answer.json()["usage"], answer.json()["metrics"]
    assert usage["num_experts"] == 2 and metrics["experts_option"] == "cost2"
    assert usage["experts"] == {"option": "cost2", "chosen_by": "auto", "relative_quality": 0.9512}
    assert answer.headers["x-num-experts"] == "2" and answer.headers["x-experts-option"] == "cost2"


def test_a_latency_chooses_the_best_option_and_reports_what_is_expected(client: TestClient, engine: FakeEngine) -> None:
    usage = asked(client, {"auto": {"max_itl_ms": 5.0}}).json()["usage"]
    assert engine.seen[-1].budget == K4
    assert usage["experts"]["predicted_itl_ms"] == 5.0 and usage["experts"]["bound_met"] is True
    usage = asked(client, {"auto": {"max_itl_ms": 2.5, "min_quality": 0.9}}).json()["usage"]
    assert engine.seen[-1].budget == COST2
    assert usage["experts"]["bound_met"] is False, "the floor wins, and that is told"


def test_every_endpoint_reports_it_streamed_and_whole(client: TestClient) -> None:
    experts = {"auto": {"min_quality": 0.9}}
    chat = {"messages": [{"role": "user", "content": "hi"}], "experts": experts}
    response = {"input": "hi", "experts": experts}
    assert client.post(CHAT, json=chat).json()["usage"]["experts"]["option"] == "cost2"
    assert client.post("/v1/responses", json=response).json()["usage"]["experts"]["option"] == "cost2"
    streamed = client.post(CHAT, json=chat | {"stream": True, "stream_options": {"include_usage": True}})
    assert streamed.headers["x-num-experts"] == "2"
    last = json.loads(frames(streamed.text)[-2])
    assert last["usage"]["experts"]["option"] == last["metrics"]["experts_option"] == "cost2"


def test_an_ordinary_request_reports_no_option(client: TestClient) -> None:
    for fields in ({}, {"num_experts": 2}):
        body = asked(client, **fields).json()
        assert "experts" not in body["usage"] and "experts_option" not in body["metrics"]


def test_what_no_option_gives_is_refused_when_it_is_asked(client: TestClient, engine: FakeEngine) -> None:
    error = asked(client, {"auto": {"min_quality": 1.5}}, 400).json()["error"]
    assert error["param"] == "experts.auto.min_quality" and "k8" in error["message"] and not engine.seen


def test_a_named_option_runs_with_its_rule(client: TestClient, engine: FakeEngine) -> None:
    usage = asked(client, {"profile": "cost2"}).json()["usage"]
    assert engine.seen[-1].budget == COST2
    assert usage["experts"] == {"option": "cost2", "chosen_by": "request", "relative_quality": 0.9512}
    assert usage["num_experts"] == 2


def test_tiers_are_aliases_that_are_listed_and_say_their_option(client: TestClient, engine: FakeEngine) -> None:
    listed = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert [id for id in listed if id in ("tiny@fast", "tiny@balanced", "tiny@best")] == [
        "tiny@fast",
        "tiny@balanced",
        "tiny@best",
    ]
    for tier, option, count in (("fast", "cost2", 2), ("balanced", "k4", 4), ("best", "k8", 8)):
        answer = asked(client, model=f"tiny@{tier}")
        assert sum(engine.seen[-1].budget.per_layer) == 3 * count
        assert answer.json()["usage"]["experts"]["option"] == option and answer.json()["model"] == f"tiny@{tier}"
        card = listed[f"tiny@{tier}"]
        assert card["meta"]["moe"]["default"] == count and card["meta"]["moe"]["option"] == option
        assert client.get(f"/v1/models/tiny@{tier}").json() == card
    assert "must agree" in asked(client, model="tiny@fast", num_experts=4, status=400).json()["error"]["message"]
    assert asked(client, model="tiny@balanced", num_experts=4).json()["usage"]["num_experts"] == 4


def test_an_operators_alias_wins_over_a_tier(engine: FakeEngine) -> None:
    with in_memory(engine, calibration=calibration(), aliases="fast=1") as client:
        assert "experts" not in asked(client, model="tiny@fast").json()["usage"]
        assert engine.seen[-1].budget == K1
        ids = [card["id"] for card in client.get("/v1/models").json()["data"]]
        assert ids.count("tiny@fast") == 1 and "tiny@best" in ids


def test_without_a_calibration_there_are_no_tiers_and_auto_names_the_command(engine: FakeEngine) -> None:
    with in_memory(engine) as client:
        error = asked(client, {"auto": {"min_quality": 0.9}}, 400).json()["error"]
        assert error["code"] == "no_calibration" and "moedial calibrate" in error["message"]
        assert asked(client, model="tiny@fast", status=404).json()["error"]["code"] == "model_not_found"


def test_the_load_counts_when_a_request_starts_not_when_it_arrives(engine: FakeEngine) -> None:
    """Both wait until the first has ended: then one runs, and the same bound allows more experts."""
    engine.gate = asyncio.Event()
    body = {"prompt": "hi", "experts": {"auto": {"max_itl_ms": 6.0}}}
    with on_loopback(engine, calibration=calibration(), max_running=3) as (url, _):
        with in_background(3, url + COMPLETIONS, body) as answers:
            eventually(lambda: len(engine.seen) == 3)
            engine.gate.set()
        counts = sorted(request.budget.per_layer[0] for request in engine.seen)
        assert counts[-1] == 4 and counts[0] < 4, "the first runs alone, the last beside two others"
        assert all(answer.status_code == 200 for answer in answers)


def test_all_answers_of_a_call_get_one_option_which_allows_for_them_all(client: TestClient, engine: FakeEngine) -> None:
    asked(client, {"auto": {"max_itl_ms": 6.0}}, n=8)
    (budget,) = {request.budget for request in engine.seen}
    assert budget != K4, "eight at once take longer"


def test_the_option_is_chosen_again_while_the_answer_is_generated(engine: FakeEngine) -> None:
    engine.script, engine.gate, engine.free = says("a long answer"), asyncio.Event(), 3
    body = {"prompt": "hi", "experts": {"auto": {"max_itl_ms": 6.0, "adapt": True}}}
    with (
        on_loopback(engine, calibration=calibration()) as (url, _),
        in_background(1, url + COMPLETIONS, body) as answers,
    ):
        eventually(lambda: len(engine.seen) == 1)
        with in_background(4, url + COMPLETIONS, {"prompt": "hi", "num_experts": 1}):
            eventually(lambda: len(engine.changed) >= 1)
            engine.gate.set()
    assert engine.seen[0].budget == K4
    id, counts = engine.changed[0]
    assert id == engine.seen[0].id and sum(counts) < 12
    assert answers[0].json()["usage"]["experts"]["option"] != "k4"


def test_without_adapt_nothing_changes_on_the_way(engine: FakeEngine) -> None:
    with in_memory(engine, calibration=calibration()) as client:
        asked(client, {"auto": {"max_itl_ms": 6.0}})
        assert service_of(client).chooser.options.options and engine.changed == []
