"""Several models behind one app: which one answers, what is listed and counted, and what the operator's key opens."""

import threading
from typing import Any

import pytest
from starlette.testclient import TestClient

from model.errors import EngineDown
from server.configuration.variables import BadSetting
from server.models.host import HostedModels
from server.settings import Settings
from tests.server.fakes import FakeEngine, says
from tests.server.harness import eventually
from tests.server.models.several import BYTES, app_of_models, several

ADMIN = {"authorization": "Bearer sk-admin"}
KEY = {"authorization": "Bearer sk-one"}


def engines() -> dict[str, FakeEngine]:
    return {name: FakeEngine(says(f"I am {name}")) for name in ("small", "org/large")}


def ask(client: TestClient, path: str = "/v1/completions", **body: Any) -> Any:
    return client.post(path, json={"prompt": "hi", "max_tokens": 32, **body})


def text(client: TestClient, **body: Any) -> str:
    answer = ask(client, **body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def loaded(client: TestClient) -> list[str]:
    listed = client.get("/v1/models").json()["data"]
    return [card["id"] for card in listed if card["meta"]["loaded"] and not card["parent"]]


def test_the_name_or_alias_chooses_the_model_and_loads_it() -> None:
    fakes = engines()
    with several(fakes, models_memory=BYTES) as client:
        assert loaded(client) == ["small"]
        assert text(client) == text(client, model="small") == "I am small"
        assert text(client, model="org/large@k2") == "I am org/large" and loaded(client) == ["org/large"]
        assert fakes["org/large"].seen[-1].budget.per_layer == (2, 2, 2)
        assert text(client, extra_body={"model": "small"}) == "I am small" and loaded(client) == ["small"]
        assert fakes["org/large"].state == "stopped"
        said = {"messages": [{"role": "user", "content": "hi"}], "stream": False}
        for path, model in (("/v1/chat/completions", "org/large"), ("/api/chat", "org/large:k2")):
            assert "I am org/large" in ask(client, path, model=model, **said).text
        assert "I am small" in ask(client, "/v1/messages", model="small", **said).text


def test_an_unknown_model_is_each_apis_own_404_and_loads_nothing() -> None:
    fakes = engines()
    with several(fakes) as client:
        answer = ask(client, model="huge@k2")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
        assert "'huge@k2' does not exist; this server has 'small', 'org/large'" in answer.text
        for wrong in ("org/large@k99", "org/large:k2"):
            assert ask(client, model=wrong).json()["error"]["code"] == "model_not_found"
        said = {"messages": [{"role": "user", "content": "hi"}], "model": "huge"}
        anthropic = ask(client, "/v1/messages", **said)
        assert anthropic.status_code == 404 and anthropic.json()["error"]["type"] == "not_found_error"
        assert isinstance(ask(client, "/api/chat", **said).json()["error"], str)
        for body, field in (({"model": 3}, "model"), ({"model": "small", "max_tokens": "x"}, "max_tokens")):
            refused = ask(client, **body)
            assert refused.status_code == 400 and refused.json()["error"]["param"] == field
        assert (
            client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}).status_code
            == 400
        )
        assert loaded(client) == ["small"]
        assert client.get("/v1/models/huge").status_code == client.get("/calibration?model=huge").status_code == 404
        assert 'requests_rejected_total{engine="0",model_name="",reason="model_not_found"} 5.0' in metrics(client)


def metrics(client: TestClient) -> str:
    return str(client.get("/metrics").text)


def test_a_model_that_does_not_fit_beside_busy_ones_is_refused_with_retry_after() -> None:
    fakes = engines()
    with several(fakes, models_memory=BYTES) as client:
        gate = FakeGate()
        fakes["small"].gate = gate  # type: ignore[assignment]
        asking = threading.Thread(target=lambda: text(client, model="small"))
        asking.start()
        eventually(lambda: fakes["small"].seen)
        busy = ask(client, model="org/large")
        assert busy.status_code == 503 and busy.headers["retry-after"] == "1"
        assert busy.json()["error"]["code"] == "models_busy" and "in use: small" in busy.text
        gate.open = True
        asking.join(5)
        assert text(client, model="org/large") == "I am org/large"


class FakeGate:
    """Holds tokens back until a test opens it, from another thread."""

    open = False

    async def wait(self) -> None:
        import asyncio

        while not self.open:
            await asyncio.sleep(0.002)


def test_what_is_listed_is_known_before_a_model_is_loaded() -> None:
    with several(engines()) as client:
        cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert "org/large@k2" in cards and "small@k8" in cards
        assert cards["small"]["meta"]["loaded"] and not cards["org/large@k2"]["meta"]["loaded"]
        assert client.get("/v1/models/org/large@k3").json()["meta"]["moe"]["default"] == 3
        assert [one["name"] for one in client.get("/api/ps").json()["models"]] == ["small:latest"]
        assert "org/large:k2" in [one["name"] for one in client.get("/api/tags").json()["models"]]
        for path, body in (
            ("/tokenize", {"model": "org/large", "prompt": "hi"}),
            ("/detokenize", {"model": "org/large", "tokens": [104]}),
            ("/api/show", {"name": "org/large"}),
        ):
            assert client.post(path, json=body).status_code == 200
        assert client.get("/tokenizer_info?model=org/large").status_code == 200
        assert loaded(client) == ["small"]


def test_one_scrape_has_the_series_of_all_models() -> None:
    with several(engines()) as client:
        text(client, model="small")
        lines = metrics(client).splitlines()
        assert len([line for line in lines if line.startswith("# TYPE moedial:generation_tokens_total")]) == 1
        assert len(set(lines)) == len(lines)
        series = [line for line in lines if line.startswith("moedial:generation_tokens_total{")]
        assert len(series) == 1 and 'model_name="small"' in series[0]
        assert 'moedial:engine_up{engine="0",model_name="small"} 1.0' in lines
        assert not [line for line in lines if line.startswith("moedial:engine_up{") and "org/large" in line]
        assert "moedial:prompt_tokens_total" in metrics(client)
        assert [line for line in lines if line.startswith("moedial:http_requests_total{") and 'model_name=""' in line]
        text(client, model="org/large")
        assert 'moedial:engine_restarts_total{engine="0",model_name="org/large"} 0.0' in metrics(client)


def test_a_model_whose_engine_died_leaves_the_others() -> None:
    fakes = engines()
    with several(fakes, preload=("small", "org/large")) as client:
        fakes["org/large"].state = "restarting"
        down = ask(client, model="org/large")
        assert down.status_code == 503 and down.json()["error"]["code"] == "engine_down"
        assert text(client, model="small") == "I am small"
        assert client.get("/ready").status_code == 503
        fakes["org/large"].state = "ready"
        assert client.get("/ready").status_code == 200 and text(client, model="org/large") == "I am org/large"


def test_a_model_that_cannot_be_loaded_is_refused_with_the_reason() -> None:
    fakes = engines()
    fakes["org/large"].load_error = EngineDown("a damaged file")
    with several(fakes) as client:
        answer = ask(client, model="org/large")
        assert answer.status_code == 503 and "'org/large' cannot be loaded: a damaged file" in answer.text
        assert fakes["org/large"].state == "stopped" and text(client) == "I am small"


def test_a_draining_server_loads_nothing() -> None:
    with several(engines()) as client:
        server: HostedModels = client.app.state.service  # type: ignore[attr-defined]
        server.drain()
        assert ask(client, model="org/large").status_code == client.get("/ready").status_code == 503
        assert "shutting down" in ask(client).text and server.drained and loaded(client) == ["small"]


def test_the_operators_key_loads_and_unloads() -> None:
    with several(engines(), admin_key="sk-admin", api_keys=("sk-one",)) as client:
        for wrong in ({}, KEY, {"authorization": "Bearer sk-admin2"}):
            assert client.post("/admin/models/org/large/load", headers=wrong).status_code == 401
            assert client.get("/admin/models", headers=wrong).status_code == 401
        assert client.get("/v1/models", headers=ADMIN).status_code == 401  # it opens nothing else
        one = client.post("/admin/models/org/large/load", headers=ADMIN)
        assert one.json() == {"id": "org/large", "state": "loaded", "memory_bytes": BYTES}
        two = client.post("/admin/models/small/unload", headers=ADMIN)
        assert two.json()["state"] == "absent"
        states = [one["state"] for one in client.get("/admin/models", headers=ADMIN).json()["data"]]
        assert states == ["absent", "loaded"]
        assert client.post("/admin/models/huge/unload", headers=ADMIN).status_code == 404
        answer = client.post("/v1/completions", json={"prompt": "hi"}, headers=KEY)  # unloaded is not forbidden
        assert answer.json()["choices"][0]["text"] == "I am small"


def test_without_the_key_there_are_no_such_routes() -> None:
    with several(engines()) as client:
        assert client.post("/admin/models/small/unload", headers=ADMIN).status_code == 404


def test_an_operators_key_that_is_an_api_key_is_refused() -> None:
    with pytest.raises(BadSetting, match="is an API key as well"):
        app_of_models(engines(), admin_key="sk-one", api_keys=("sk-one",))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"models": "a=x"}, "kv_cache_bytes"),
        ({"models": "a=x", "kv_cache_bytes": 1, "served_name": "b"}, "served_name"),
        ({"models": "a=x", "kv_cache_bytes": 1, "preload": "b"}, "'b' is none of --models: a"),
        ({"models": "a@k2=x"}, "expected NAME=FOLDER"),
        ({"models": "a=x,a=y"}, "'a' is there twice"),
        ({"models_memory": 1}, "needs --models"),
        ({"admin_key": "sk"}, "needs --models"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(**given)


def test_the_settings_of_one_of_several_models() -> None:
    settings = Settings(models={"a": "x", "b": "y"}, kv_cache_bytes=7, max_running=3, models_memory=9)
    assert settings.loaded_at_start == ("a",) and settings.name == "infinity-stories"
    one = settings.of_model("b")
    assert (one.name, one.model, one.models, one.kv_cache_bytes, one.max_running) == ("b", "y", {}, 7, 3)
