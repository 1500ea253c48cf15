"""Grammars are compiled before their calls take a slot: a plain request never waits behind them."""

import threading
from typing import Any

import httpx
import pytest

from server.generation import compiling
from tests.server.fakes import REFUSED, FakeEngine
from tests.server.harness import COMPLETIONS, eventually, in_background, in_memory, on_loopback, service_of


def with_grammar(text: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": "hi", "guided_regex": text, "max_tokens": 3, **fields}


def compiles_slowly() -> FakeEngine:
    engine = FakeEngine()
    engine.compiling.clear()
    return engine


def test_a_plain_request_passes_those_that_are_compiled() -> None:
    engine = compiles_slowly()
    with on_loopback(engine, max_running=2) as (url, service):
        with in_background(8, url + COMPLETIONS, with_grammar("a+")) as answers:
            eventually(lambda: service.compiler.waiting == 8)
            plain = httpx.post(url + COMPLETIONS, json={"prompt": "hi", "max_tokens": 3}, timeout=5)
            assert plain.status_code == 200 and not answers
            engine.compiling.set()
        assert [answer.status_code for answer in answers] == [200] * 8
        again = httpx.post(url + COMPLETIONS, json=with_grammar("a+"))
        assert again.status_code == 200 and len(engine.compiled) == 8, "what is known is not asked about again"
        engine.restarts += 1
        httpx.post(url + COMPLETIONS, json=with_grammar("a+"))
        assert len(engine.compiled) == 9, "a new engine process has compiled nothing"


def test_several_answers_have_one_grammar() -> None:
    with in_memory(engine := FakeEngine()) as client:
        assert client.post(COMPLETIONS, json=with_grammar("a+", n=4)).status_code == 200
        assert len(engine.compiled) == 1
        refused = client.post(COMPLETIONS, json=with_grammar(REFUSED.strip("/"), n=4))
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "guided_regex"
        assert service_of(client).compiler.waiting == service_of(client).admission.held == 0


def test_the_queue_of_grammars_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MAX_WAITING", 2)
    engine = compiles_slowly()
    with on_loopback(engine) as (url, service), in_background(2, url + COMPLETIONS, with_grammar("a+")):
        eventually(lambda: service.compiler.waiting == 2)
        full = httpx.post(url + COMPLETIONS, json=with_grammar("b+"), timeout=5)
        assert full.status_code == 503 and "the queue of grammars is full: 2 wait" in full.text
        engine.compiling.set()


def test_who_waits_too_long_or_leaves_gives_its_place_back() -> None:
    before = threading.active_count()  # other tests of this process may have left some
    engine = compiles_slowly()
    with on_loopback(engine, queue_timeout=0.2) as (url, service):
        late = httpx.post(url + COMPLETIONS, json=with_grammar("a+"), timeout=5)
        assert late.status_code == 503 and late.json()["error"]["code"] == "queue_timeout" and "compiled" in late.text
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + COMPLETIONS, json=with_grammar("a+"), timeout=0.05)
        eventually(lambda: service.compiler.waiting == service.admission.held == 0)
        assert len(engine.aborted) == 2
    assert threading.active_count() < before + 50
