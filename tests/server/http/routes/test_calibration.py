"""GET /calibration, and what /v1/models says of a calibration."""

from typing import Any

import msgspec
import pytest
from starlette.testclient import TestClient

from tests.server.calibrations import calibration
from tests.server.fakes import FakeEngine
from tests.server.harness import CARD, in_memory
from weights.calibration import Calibration

PATH = "/calibration"


def moe(client: TestClient, model: str = "tiny") -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/v1/models/{model}").json()["meta"]["moe"]
    return found


def test_the_whole_calibration_comes_as_json() -> None:
    with in_memory(calibration=calibration()) as client:
        answer = client.get(PATH)
    assert answer.headers["content-type"] == "application/json"
    assert msgspec.json.decode(answer.content, type=Calibration) == calibration()


@pytest.mark.parametrize(
    ("query", "accept", "picture"),
    [
        ("?format=svg", "*/*", True),
        ("", "image/avif,image/svg+xml,image/*,*/*;q=0.8", True),
        ("", "*/*", False),
        ("", "application/json, image/svg+xml", False),
        ("?format=json", "image/svg+xml", False),
    ],
)
def test_a_picture_comes_to_those_who_ask_for_one(query: str, accept: str, picture: bool) -> None:
    with in_memory(calibration=calibration()) as client:
        answer = client.get(PATH + query, headers={"accept": accept})
    assert answer.headers["content-type"].startswith("image/svg+xml" if picture else "application/json")
    assert answer.content.lstrip().startswith(b"<" if picture else b"{")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_another_format_is_refused_by_name() -> None:
    with in_memory(calibration=calibration()) as client:
        answer = client.get(f"{PATH}?format=png")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "format"
    assert "'png'" in answer.json()["error"]["message"]


@pytest.mark.parametrize("query", ["", "?format=svg"])
def test_without_one_the_answer_is_404_with_the_command(query: str) -> None:
    with in_memory() as client:
        answer = client.get(PATH + query)
    error = answer.json()["error"]
    assert answer.status_code == 404 and error["code"] == "not_calibrated"
    assert "moedial calibrate" in error["message"]


def test_it_needs_a_key_as_the_models_do() -> None:
    with in_memory(calibration=calibration(), api_keys="secret") as client:
        assert client.get(PATH).status_code == client.get("/v1/models").status_code == 401
        assert client.get(PATH, headers={"authorization": "Bearer secret"}).status_code == 200


def test_it_is_503_while_the_model_loads() -> None:
    engine = FakeEngine()
    with in_memory(engine, calibration=calibration()) as client:
        client.app.state.service.loaded = None  # type: ignore[attr-defined]
        assert client.get(PATH).status_code == 503


def test_quality_per_count_is_the_calibrations() -> None:
    with in_memory(calibration=calibration()) as client:
        found, alias = moe(client), moe(client, "tiny@k2")
    assert [row["num_experts"] for row in found["quality"]] == [1, 2, 4, 8]
    best = found["quality"][2]
    assert best == {
        "num_experts": 4,
        "name": "k4",
        "loss": 1.4,
        "perplexity": 4.0552,
        "agreement": 1.0,
        "kl": 0.0,
        "relative_quality": 1.0,
        "tokens_per_second": 200.0,
        "relative_cost": 1.0,
    }
    speeds = [row["tokens_per_second"] for row in found["quality"]]
    assert speeds == sorted(speeds, reverse=True)
    assert found["calibration"] == {
        "created": "2026-11-27T00:00:00Z",
        "machine": "a machine",
        "text": "some stories",
        "tokens": 4096,
    }
    assert alias["quality"] == found["quality"]


def test_profiles_are_listed_with_the_field_that_asks_for_them() -> None:
    with in_memory(calibration=calibration()) as client:
        found = moe(client)
    profile, repaired = found["profiles"]
    assert profile["name"] == "cost2" and profile["experts"] == {"count": [1, 1, 4]}
    assert repaired["experts"] == {"count": 2, "normaliser": "kept", "repair": True}
    assert profile["relative_quality"] < 1 and repaired["counts"] == [2, 2, 2]
    assert found["normalisers"] == {"2": "kept"} and found["repaired"] == [2] and found["thresholds"] == {"2": 0.3}
    assert found["tiers"] == {"tiny@fast": "cost2", "tiny@balanced": "k4", "tiny@best": "k8"}


def test_without_one_the_card_counts_and_the_reason_is_given() -> None:
    with in_memory() as client:
        found = moe(client)
    assert found["quality"] == CARD["quality"]
    assert "moedial calibrate" in found["calibration"]["reason"] and "profiles" not in found
