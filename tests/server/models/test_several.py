"""Two bundled models that share a server whose memory holds one of them: engine processes start, end and die."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.models.host import HostedModels
from server.serve import load
from server.settings import Settings
from tests.server.harness import eventually
from weights.folder import BUNDLED
from weights.sizes import weight_size

MODELS = {"mu": "mu-stories", "deep": "deep-stories"}
CACHE = 4 << 20


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    weights = max(weight_size(BUNDLED / folder, "auto").bytes for folder in MODELS.values())
    options: dict[str, Any] = {"kv_cache_bytes": CACHE, "models_memory": weights + CACHE, "step_ms": 0, "threads": 1}
    app = load(Settings(models=MODELS, max_model_len=64, max_running=2, **options))
    with TestClient(app) as client:
        eventually(lambda: app.state.service.booted or app.state.service.boot_error, 120)
        yield client


def answer(client: TestClient, model: str) -> str:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
    answered = client.post("/v1/completions", json=body)
    assert answered.status_code == 200, answered.text
    return str(answered.json()["choices"][0]["text"])


def in_memory(client: TestClient) -> set[str]:
    return {card["root"] for card in client.get("/v1/models").json()["data"] if card["meta"]["loaded"]}


def test_two_models_answer_in_turn_though_the_engine_of_the_first_dies(client: TestClient) -> None:
    server: HostedModels = client.app.state.service  # type: ignore[attr-defined]
    mu, deep = server.service_of("mu"), server.service_of("deep")
    assert answer(client, "mu") and in_memory(client) == {"mu"}
    pid, expected = mu.engine.pid, deep.described.info
    assert pid is not None and deep.engine.pid is None
    os.kill(pid, signal.SIGKILL)
    assert answer(client, "deep@k1") and in_memory(client) == {"deep"}
    assert mu.engine.state == "stopped" and mu.engine.pid is None
    loaded = deep.served_models.info
    for known in ("family", "experts", "experts_total", "max_model_len", "vocabulary", "dtype", "token_local"):
        assert getattr(expected, known) == getattr(loaded, known), known  # config.json had said so before
