"""What the log says of refused requests: field, code and message, nothing of a prompt, and no flood of probes."""

import json
from typing import Any

import pytest
import structlog
from starlette.testclient import TestClient

from model.errors import EngineDown, InvalidRequest
from server.errors import loggable
from tests.server.fakes import FakeEngine
from tests.server.harness import COMPLETIONS, app_of, eventually, in_memory, service_of


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"prompt": "hi", "temperature": 200}, "temperature", "got 200"),
        ({"prompt": "hi", "num_experts": 99}, "num_experts", "got 99"),
        ({"prompt": "hi", "model": "other"}, "model", "'other'"),
        ({"prompt": {"SECRET": 1}}, "prompt", ""),
        ({"prompt": "hi", "user": ["SECRET"]}, "user", "got …"),
        ({"prompt": "hi", "temperature": "SECRET"}, "temperature", "got '…'"),
    ],
)
def test_a_refusal_says_field_code_and_reason_but_no_text_of_the_caller(
    body: dict[str, Any], field: str, words: str
) -> None:
    with in_memory() as client, structlog.testing.capture_logs() as logged:
        assert client.post(COMPLETIONS, json=body).status_code in (400, 404)
    [line] = [line for line in logged if line["event"] == "refused"]
    assert line["field"].startswith(field) and line["code"] and words in line["reason"]
    assert "SECRET" not in json.dumps(line)


def test_reasons_are_bounded_and_quoted_values_left_out() -> None:
    def said(message: str, param: str = "prompt", code: str = "invalid_value") -> str:
        return loggable(InvalidRequest(message, param, code))

    assert said("a: this model's limit is 5, got 'it\\'s SECRET' now") == "a: this model's limit is 5, got '…' now"
    assert said("a is 'SECRET, cut in the midd") == "a is '…'"
    assert said("a is \"SECRET\n'x'\" and so on") == 'a is "…" and so on'
    assert said("the grammar cannot be used: near SECRET", code="invalid_grammar") == "the grammar cannot be used"
    assert len(said("x" * 1000)) == 301
    assert loggable(EngineDown("the engine is 'loading'")) == "the engine is 'loading'"


def test_probes_do_not_flood_the_log_while_the_model_loads() -> None:
    engine = FakeEngine()
    engine.load_error = EngineDown("not yet")
    with TestClient(app_of(engine)) as client, structlog.testing.capture_logs() as logged:
        eventually(lambda: service_of(client).boot_error is not None)
        for path in ("/ready", "/health"):
            assert client.get(path).status_code == 503
        assert client.post(COMPLETIONS, json={"prompt": "hi"}).status_code == 503
    levels = {line["route"]: line["log_level"] for line in logged if line["event"] == "refused"}
    assert levels == {"/ready": "debug", "/health": "debug", COMPLETIONS: "info"}
