"""Log lines and trace spans of HTTP requests: one each, with figures and never text, and none where no setting asks."""

import ast
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog
from starlette.testclient import TestClient

from server.app import create_app
from server.configuration.variables import BadSetting
from server.settings import Settings
from server.tracing import AnsweredRequest, Tracing, attributes_of
from tests.server.fakes import FakeChat, FakeEngine, FakeTokenizer
from tests.server.harness import CARD, CHAT, COMPLETIONS, eventually, in_memory, service_of

SERVER = Path(__file__).parent.parent.parent / "server"
WATCHED = "/health"  # by the harness
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_every_request_has_one_log_line_without_query_or_text() -> None:
    with in_memory(access_log=True, api_keys="SECRET") as client, structlog.testing.capture_logs() as logged:
        key = {"authorization": "Bearer SECRET"}
        client.post(COMPLETIONS, json={"prompt": "SECRET", "max_tokens": 2}, headers=key | {"x-request-id": "a"})
        client.post(COMPLETIONS, json={"prompt": "SECRET", "max_tokens": 2, "stream": True}, headers=key)
        client.post(COMPLETIONS, json={"prompt": "SECRET"})
        client.get("/v1/nothing?SECRET")
        client.get("/ready")
    lines = [line for line in logged if line["event"] == "request" and line["path"] != WATCHED]
    shown = [(line["method"], line["path"], line["status"], line["log_level"]) for line in lines]
    assert shown == [
        ("POST", COMPLETIONS, 200, "info"),
        ("POST", COMPLETIONS, 200, "info"),
        ("POST", COMPLETIONS, 401, "info"),
        ("GET", "/v1/nothing", 401, "info"),
        ("GET", "/ready", 200, "debug"),
    ]
    assert lines[0]["request_id"] == "a" and [line.get("key") for line in lines[1:3]] == ["key-1", None]
    assert "SECRET" not in json.dumps(lines)


def test_there_is_no_line_unless_it_is_asked_for() -> None:
    with in_memory() as client, structlog.testing.capture_logs() as logged:
        client.get("/v1/models")
    assert not [line for line in logged if line["event"] == "request"]


def test_an_internal_error_is_logged_and_traced_as_the_500_that_it_becomes(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[AnsweredRequest] = []
    engine = FakeEngine()
    tracing = SimpleNamespace(record=traced.append, stop=lambda: None)
    settings = Settings(model="tiny", access_log=True)
    app = create_app(settings, engine, FakeTokenizer(), FakeChat(), CARD, tracing=cast(Tracing, tracing))
    with TestClient(app, raise_server_exceptions=False) as client, structlog.testing.capture_logs() as logged:
        eventually(lambda: service_of(client).loaded is not None)
        monkeypatch.setattr(service_of(client), "check_ready", lambda: 1 / 0)
        answers = [client.post(path, json={"messages": []}) for path in (CHAT, "/v1/messages")]
    assert [answer.status_code for answer in answers] == [500, 500]
    lines = [line for line in logged if line["event"] == "request"]
    assert [line["status"] for line in lines] == [request.status for request in traced] == [500, 500]
    assert answers[1].headers["request-id"] == answers[1].headers["x-request-id"] == lines[1]["request_id"]


def test_a_request_that_generates_has_one_span() -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracing = Tracing.from_environment(exporter)
    app = create_app(Settings(model="tiny"), FakeEngine(), FakeTokenizer(), FakeChat(), CARD, tracing=tracing)
    with TestClient(app) as client:
        eventually(lambda: service_of(client).loaded is not None)
        body = {"prompt": "hi", "max_tokens": 3, "num_experts": 2}
        client.post(COMPLETIONS, json=body, headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"})
        client.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}], "stream": True, "num_experts": 8})
        client.post(COMPLETIONS, json=body | {"num_experts": 99})
        client.get("/v1/models")
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["text_completion tiny", "chat tiny", "text_completion"]
    assert [span.attributes.get("moe.num_experts") for span in spans] == [2, 8, None]
    assert [span.attributes["http.response.status_code"] for span in spans] == [200, 200, 400]
    assert spans[0].attributes["gen_ai.usage.output_tokens"] == 3 and spans[0].end_time > spans[0].start_time
    assert f"{spans[0].context.trace_id:032x}" == TRACE != f"{spans[1].context.trace_id:032x}"
    assert spans[0].resource.attributes["service.name"] == "moedial"


def test_fastapi_sends_nothing_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, metrics = pytest.importorskip("opentelemetry.trace"), pytest.importorskip("opentelemetry.metrics")
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    before = (trace.get_tracer_provider(), metrics.get_meter_provider())
    with in_memory() as client:
        client.get("/v1/models")
    assert (trace.get_tracer_provider(), metrics.get_meter_provider()) == before


def test_spans_are_sent_where_the_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "stories")
        tracing = Tracing.from_environment()
        call = {"model": "tiny@k2", "id": "a", "outcomes": ["stop"], "prompt_tokens": 1, "completion_tokens": 2}
        call |= {"num_experts": 2, "request_id": "b"}
        tracing.record(AnsweredRequest(COMPLETIONS, 200, 1, 2, {}, call))
        tracing.stop()
        server.shutdown()
    [(path, body)] = received
    assert path == "/v1/traces" and b"stories" in body and b"moe.num_experts" in body


def test_attributes_hold_no_text_and_name_an_error() -> None:
    refused = attributes_of(AnsweredRequest(COMPLETIONS, 503, 1, 2, {}, {}))
    assert refused["error.type"] == "503" and "gen_ai.request.model" not in refused


def test_another_protocol_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(BadSetting, match=r"OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"):
        Tracing.from_environment()


def test_opentelemetry_is_imported_inside_a_function_only() -> None:
    """So that nothing of it is loaded without the flag, and it need not be installed."""
    for path in SERVER.rglob("*.py"):
        if "opentelemetry" not in (text := path.read_text()):
            continue
        top_level = ast.parse(text).body
        imports = [ast.unparse(node) for node in top_level if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not [line for line in imports if "opentelemetry" in line], path
