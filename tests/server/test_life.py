"""The life of requests: overload, disconnects, failures, time limits, draining; each ends once and is counted once."""

import asyncio
import json
import socket
import time
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from model.errors import EngineDown, GenerationFailed, InvalidRequest
from server.formats.completions import CompletionFormat
from server.generation.output_processor import Delta
from server.http.h11 import ChunkWriter
from server.service import Service
from tests.server.fakes import FakeEngine, says
from tests.server.harness import (
    CHAT,
    COMPLETIONS,
    app_of,
    ended,
    eventually,
    frames,
    in_background,
    in_memory,
    on_loopback,
    service_of,
    value,
)


def idle(engine: FakeEngine, service: Service) -> bool:
    admission = service.admission
    return not engine.running and (admission.held, admission.tokens, admission.waiting) == (0, 0, 0)


def gated() -> FakeEngine:
    """An engine that waits for its gate before every token."""
    engine = FakeEngine(says("x" * 200))
    engine.gate = asyncio.Event()
    return engine


def test_overload_is_a_503_at_once_and_the_others_are_served() -> None:
    engine = gated()
    with on_loopback(engine, max_running=1, queue_size=2) as (url, service):
        with in_background(3, url + COMPLETIONS, {"prompt": "hi"}) as answers:
            eventually(lambda: service.admission.held == 3)
            began = time.monotonic()
            for body in ({"prompt": "hi"}, {"prompt": "hi", "stream": True}, {"prompt": ["a", "b"]}):
                over = httpx.post(url + COMPLETIONS, json=body)
                assert over.status_code == 503 and int(over.headers["retry-after"]) >= 1
                assert over.json()["error"]["code"] == "queue_full" and "x-should-retry" not in over.headers
            assert time.monotonic() - began < 1.0
            assert value(service, "num_requests_waiting") >= 1
            too_many = httpx.post(url + COMPLETIONS, json={"prompt": "hi", "n": 4})
            assert too_many.status_code == 400 and too_many.json()["error"]["param"] == "n"
            assert engine.gate is not None
            engine.gate.set()
        assert [answer.status_code for answer in answers] == [200] * 3
        eventually(lambda: idle(engine, service))
        assert value(service, "requests_rejected_total", reason="queue_full") == 3
        assert ended(service) == 7


def test_held_prompt_tokens_are_bounded() -> None:
    with in_memory(max_queued_tokens=100) as client:
        too_much = client.post(COMPLETIONS, json={"prompt": "x" * 30, "n": 4})
        assert too_much.status_code == 400 and "120" in too_much.json()["error"]["message"]
        assert client.post(COMPLETIONS, json={"prompt": "x" * 25, "n": 4}).status_code == 200
        assert service_of(client).admission.tokens == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_aborts_the_sequence(stream: bool) -> None:
    engine = gated()
    with on_loopback(engine) as (url, service):
        for _ in range(10):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url + COMPLETIONS, json={"prompt": "hi", "n": 2, "stream": stream}, timeout=0.03)
        eventually(lambda: idle(engine, service) and value(service, "requests_aborted_total") == 20)
        assert ended(service) == 20


def test_a_disconnect_in_the_middle_of_a_stream_aborts_the_sequence() -> None:
    engine = gated()
    engine.free = 3
    with on_loopback(engine) as (url, service):
        body = {"prompt": "hi", "stream": True, "max_tokens": 200}
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        others = [("/v1/messages", body | asked), ("/api/chat", asked), ("/api/generate", {"prompt": "hi"})]
        for path, sent in [(COMPLETIONS, body)] * 10 + others:
            with httpx.stream("POST", url + path, json=sent) as response:
                next(response.iter_lines())
        eventually(lambda: idle(engine, service))
        assert value(service, "requests_aborted_total") == len(engine.aborted) == 13


def test_leaving_while_in_the_queue_gives_the_place_back() -> None:
    engine = gated()
    with on_loopback(engine, max_running=1, queue_size=3) as (url, service):
        with in_background(1, url + COMPLETIONS, {"prompt": "hi"}) as answers:
            eventually(lambda: engine.running)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url + COMPLETIONS, json={"prompt": "hi", "n": 3}, timeout=0.1)
            eventually(lambda: service.admission.held == 1)
            assert engine.gate is not None
            engine.gate.set()
        assert answers[0].status_code == 200
        eventually(lambda: idle(engine, service))


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_before_the_first_token_is_an_http_error(stream: bool) -> None:
    engine = FakeEngine()
    body = {"prompt": "hi", "stream": stream}
    with in_memory(engine) as client:
        for error, status, retry in (
            (GenerationFailed("the engine process ended"), 500, False),
            (EngineDown("the engine is restarting"), 503, True),
            (InvalidRequest("larger than the KV cache", "prompt"), 400, False),
            (ValueError("a bug"), 500, False),
            ("the logits are not finite", 500, False),
        ):
            engine.fail_at = {"-0": (0, error)}
            response = client.post(COMPLETIONS, json=body)
            assert response.status_code == status, response.text
            assert ("x-should-retry" not in response.headers) == retry
            assert "a bug" not in response.text
        service = service_of(client)
        assert value(service, "requests_failed_total") == 3 and value(service, "requests_rejected_total") == 2
        assert ended(service) == 5 and idle(engine, service)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_failure_in_the_middle_of_a_stream_is_an_error_event(path: str) -> None:
    engine = FakeEngine()
    engine.fail_at = {"-0": (3, "the logits are not finite")}
    body = {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with in_memory(engine) as client:
        text = client.post(path, json=body).text
        assert "event: error\ndata: " in text and "[DONE]" not in text
        assert json.loads(frames(text)[-1])["error"]["message"] == "the logits are not finite"
        assert value(service_of(client), "requests_failed_total", type="generation_failed") == 1


def test_openai_sees_an_error_in_the_middle_of_a_stream() -> None:
    engine = FakeEngine()
    engine.fail_at = {"-0": (3, "the logits are not finite")}
    with on_loopback(engine) as (url, _):
        api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="not finite"):
            list(api.completions.create(model="tiny", prompt="hi", stream=True))


def test_one_failure_of_several_ends_the_call_and_aborts_the_rest() -> None:
    engine = gated()
    engine.fail_at = {"-1": (0, "broken")}
    with in_memory(engine) as client:
        assert client.post(COMPLETIONS, json={"prompt": "hi", "n": 3}).status_code == 500
        service = service_of(client)
        assert value(service, "requests_failed_total") == 1 and value(service, "requests_aborted_total") == 2
        assert idle(engine, service)


@pytest.mark.parametrize("stream", [True, False])
def test_time_limits(stream: bool) -> None:
    engine = gated()
    body = {"prompt": "hi", "stream": stream}
    with in_memory(engine, total_timeout=0.05) as client:
        late = client.post(COMPLETIONS, json=body)
        assert late.status_code == 504 and "0.05 s" in late.text
        assert value(service_of(client), "requests_failed_total", type="timeout") == 1
        assert idle(engine, service_of(client))


@pytest.mark.parametrize("stream", [True, False])
def test_the_queue_limit_ends_with_a_calls_first_turn(stream: bool) -> None:
    """What is ahead of a call's third sequence may be its own first; another call has waited in vain."""
    engine = gated()
    with on_loopback(engine, max_running=1, queue_size=4, queue_timeout=0.1) as (url, service):
        with in_background(1, url + COMPLETIONS, {"prompt": "hi", "n": 3}) as answers:
            eventually(lambda: len(engine.running) == 2)
            late = httpx.post(url + COMPLETIONS, json={"prompt": "hi", "stream": stream})
            assert late.status_code == 503 and late.json()["error"]["code"] == "queue_timeout"
            assert value(service, "requests_rejected_total", reason="queue_timeout") == 1
            assert ended(service) == 1 and service.admission.waiting == 1
            assert engine.gate is not None
            engine.gate.set()
        assert [answer.status_code for answer in answers] == [200]
        eventually(lambda: idle(engine, service))


def test_a_waiting_stream_sends_comments() -> None:
    engine = gated()
    with on_loopback(engine, heartbeat=0.05) as (url, _):
        body = {"prompt": "hi", "stream": True}
        with httpx.stream("POST", url + COMPLETIONS, json=body) as response:
            lines = response.iter_lines()
            assert [line for line, _ in zip(lines, range(4), strict=False)] == [": waiting", "", ": waiting", ""]
            assert engine.gate is not None
            engine.gate.set()
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_a_stop_string_ends_the_sequence_in_the_engine_too() -> None:
    engine = FakeEngine(says("abc-STOP-and much more"))
    with in_memory(engine) as client:
        answer = client.post(COMPLETIONS, json={"prompt": "hi", "stop": "-STOP-", "max_tokens": 50}).json()
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("abc", "stop")
        service = service_of(client)
        assert len(engine.aborted) == 1 and value(service, "requests_aborted_total") == 0
        assert value(service, "request_success_total", finished_reason="stop") == 1
        assert value(service, "request_queue_time_seconds_count") == 1


def test_not_ready_while_loading_draining_or_down() -> None:
    engine = FakeEngine()
    with in_memory(engine) as client:
        service = service_of(client)
        assert client.get("/ready").status_code == 200 and value(service, "engine_up") == 1
        engine.state = "restarting"
        assert client.get("/ready").status_code == client.get("/health").status_code == 503
        assert client.get("/live").status_code == 200 and value(service, "engine_up") == 0
        assert value(service, "num_requests_running") == 0
        down = client.post(COMPLETIONS, json={"prompt": "hi"})
        assert down.status_code == 503 and "restarting" in down.text and down.headers["retry-after"]
        assert client.get("/v1/models").status_code == 200
        engine.state = "ready"
        assert client.post(COMPLETIONS, json={"prompt": "hi"}).status_code == 200
        service.drain()
        assert service.drained and client.get("/ready").status_code == 503
        assert client.post(COMPLETIONS, json={"prompt": "hi"}).status_code == 503
        assert client.get("/health").status_code == 200
        assert value(service, "requests_rejected_total", reason="engine_down") == 2


@pytest.mark.parametrize("options", [{}, {"default_num_experts": 9}, {"aliases": {"fast": 9}}])
def test_a_model_that_cannot_be_served_is_never_ready(options: dict[str, Any]) -> None:
    engine = FakeEngine()
    engine.load_error = None if options else EngineDown("the model could not be loaded: config.json is missing")
    with TestClient(app_of(engine, **options)) as client:
        service = service_of(client)
        eventually(lambda: service.boot_error is not None)
        assert ("between 1 and 8" if options else "config.json") in str(service.boot_error)
        assert client.get("/ready").status_code == client.get("/v1/models").status_code == 503
        assert client.get("/health").status_code == 503 and client.get("/live").status_code == 200
        assert client.post(COMPLETIONS, json={"prompt": "hi"}).status_code == 503


def send_slowly(url: str, data: bytes) -> bytes:
    """Send and wait for whatever comes until the other side closes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(4096):
            answer += part
        return answer


def test_half_sent_requests_are_ended() -> None:
    with on_loopback(FakeEngine(), header_timeout=0.1, body_timeout=0.1, max_body_bytes=1000) as (url, service):
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        assert send_slowly(url, b"").startswith(b"HTTP/1.1 408")
        assert send_slowly(url, head).startswith(b"HTTP/1.1 408")
        assert send_slowly(url, head + b"content-length: 100\r\n\r\n{").startswith(b"HTTP/1.1 408")
        assert send_slowly(url, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /he").endswith(b'"header_timeout"}}')
        endless = head + b"transfer-encoding: chunked\r\n\r\n" + b"100\r\n" + b"x" * 256 + b"\r\n"
        assert send_slowly(url, endless + b"400\r\n" + b"x" * 1024 + b"\r\n").startswith(b"HTTP/1.1 413")
        assert value(service, "requests_rejected_total", reason="body_timeout") == 1


def test_a_caller_who_leaves_while_sending_is_no_error() -> None:
    with on_loopback(FakeEngine()) as (url, service):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            connection.sendall(head + b"content-length: 100\r\n\r\n{")
        eventually(lambda: value(service, "requests_rejected_total") == 1)
        assert value(service, "requests_rejected_total", reason="client_gone") == 1


def test_a_running_stream_outlives_the_header_deadline() -> None:
    engine = gated()
    with (
        on_loopback(engine, header_timeout=0.05) as (url, _),
        in_background(1, url + COMPLETIONS, {"prompt": "hi"}) as got,
    ):
        time.sleep(0.2)
        assert engine.gate is not None
        engine.gate.set()
    assert got[0].status_code == 200


def test_tokens_go_straight_to_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what arrives is what ASGI's way makes of the same answer."""
    written: list[bytes] = []
    write = ChunkWriter.write
    monkeypatch.setattr(ChunkWriter, "write", lambda self, data: (written.append(data), write(self, data))[1])
    text = 6 * "straight to the wire"
    body = {"prompt": "hi", "stream": True, "stop": "x", "max_tokens": 200, "seed": 1}
    with on_loopback(FakeEngine(says(text))) as (url, _):
        direct = frames(httpx.post(url + COMPLETIONS, json=body).text)
        count = len(written)
        assert 5 < count < len(text)  # not before the headers, nor the last one
        assert httpx.post(url + COMPLETIONS, json=body | {"n": 2}).status_code == 200
        assert len(written) == count  # deltas of several sequences that arrive together are written together
    with in_memory(FakeEngine(says(text))) as client:
        layered = frames(client.post(COMPLETIONS, json=body).text)
    said = [[json.loads(frame)["choices"] for frame in got[:-1]] for got in (direct, layered)]
    assert said[0] == said[1] and direct[-1] == layered[-1] == "[DONE]"


def test_an_http_1_0_caller_gets_no_chunks() -> None:
    with on_loopback(FakeEngine(says("hello"))) as (url, _):
        body = json.dumps({"prompt": "hi", "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        answer = send_slowly(url, head % len(body) + body)
    lines = answer.partition(b"\r\n\r\n")[2].decode().splitlines()
    assert all(line.startswith("data: ") or not line for line in lines) and lines[-2] == "data: [DONE]"


def test_a_reader_who_is_slow_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection fills up; the tokens wait in the list and go on as it reads."""
    full: list[bool] = []
    paused = ChunkWriter.paused.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(ChunkWriter, "paused", property(lambda self: (full.append(paused(self)), full[-1])[1]))
    text = "".join(chr(97 + i % 26) for i in range(4_000))
    engine = FakeEngine(says(text))
    assert engine.info is not None
    engine.info = replace(engine.info, max_model_len=5_000)
    with on_loopback(engine, served_name="m" * 2000) as (url, service):  # which every chunk says
        host, port = url.removeprefix("http://").split(":")
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((host, int(port)))
            body = json.dumps({"prompt": "hi", "stream": True, "max_tokens": len(text)}).encode()
            head = (
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
            )
            slow.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            eventually(lambda: value(service, "generation_tokens_total") == len(text), 30)
            assert any(full)
            slow.settimeout(10)
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            answer = b""
            while part := slow.recv(1 << 16):
                answer += part
    events = [json.loads(frame) for frame in frames(unchunked(answer).decode())[:-1]]
    assert "".join(event["choices"][0]["text"] for event in events) == text


def unchunked(answer: bytes) -> bytes:
    """The body of a chunked answer."""
    rest, body = answer.partition(b"\r\n\r\n")[2], b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body


def test_a_fault_in_writing_ends_its_own_stream_only(monkeypatch: pytest.MonkeyPatch) -> None:
    write = CompletionFormat.write

    def broken(self: CompletionFormat, deltas: list[Delta]) -> bytes:
        if any("!" in delta.text for delta in deltas):
            raise RuntimeError("secret")
        return write(self, deltas)

    monkeypatch.setattr(CompletionFormat, "write", broken)
    script = lambda request: [*(b"fine!" if request.prompt == tuple(b"bad") else b"fine."), 0]  # noqa: E731
    engine = FakeEngine(script)
    with on_loopback(engine) as (url, service):
        bad = httpx.post(url + COMPLETIONS, json={"prompt": "bad", "stream": True}).text
        good = httpx.post(url + COMPLETIONS, json={"prompt": "good", "stream": True}).text
        assert "event: error" in bad and "secret" not in bad and "[DONE]" not in bad
        assert good.endswith("data: [DONE]\n\n")
        eventually(lambda: idle(engine, service))
