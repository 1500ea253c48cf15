"""Connections: their number, their heads, what is no HTTP, answers to requests that are still being sent, and the bytes
that all bodies have together. Raw sockets, since clients send nothing of this by themselves."""

import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.http import h11
from server.service import Service
from tests.server.fakes import FakeEngine
from tests.server.harness import COMPLETIONS, eventually, on_loopback, value

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
BODY = b'{"prompt": "hi"}'


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answered(connection: socket.socket) -> tuple[int, dict[bytes, bytes], Any]:
    """Status, headers and JSON body of what comes until the other side closes."""
    answer = b""
    while part := connection.recv(1 << 16):
        answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in lines)
    return int(status.split()[1]), headers, json.loads(body)


def status_on(connection: socket.socket) -> int:
    """The status of one answer, read to its end, on a connection that stays open."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(1)
    left = int(answer.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while left:
        left -= len(connection.recv(left))
    return int(answer.split()[1])


def refusal_of(url: str, sent: bytes) -> tuple[int, dict[str, Any]]:
    with connected(url) as connection:
        connection.sendall(sent)
        status, headers, body = answered(connection)
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert headers[b"content-type"] == b"application/json" and headers[b"connection"] == b"close"
    return status, error


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Service]]:
    with on_loopback(FakeEngine()) as (url, service):
        yield url, service


def test_a_head_is_held_to_its_limit_exactly_also_in_one_part(server: tuple[str, Service]) -> None:
    url, service = server
    limit = service.settings.max_header_bytes
    head = b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-long: "
    for size, status in ((limit, 200), (limit + 1, 431), (70_000, 431), (limit + 200_000, 431)):
        with connected(url) as connection:
            connection.sendall(head + b"x" * (size - len(head) - 4) + b"\r\n\r\n")
            got, _, body = answered(connection)
        assert got == status, size
        assert status == 200 or (
            body["error"]["code"] == "headers_too_large" and str(limit) in body["error"]["message"]
        )


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "request line"),  # TLS
        (b"what is this\r\n\r\n", "request line"),
        (b"GET /live HTTP/1.1\r\nhost: x\r\nno colon\r\n\r\n", "header line"),
        (b"GET /live HTTP/1.1\r\n\r\n", "Host"),
        (POST + b"content-length: ten\r\n\r\n", "Content-Length"),
        (POST + b"content-length: 16\r\ncontent-length: 17\r\n\r\n" + BODY, "Content-Length"),
        (POST + b"transfer-encoding: gzip\r\n\r\n", "Transfer-Encoding"),
        (
            POST + b"content-length: 16\r\ntransfer-encoding: chunked\r\n\r\n10\r\n" + BODY + b"\r\n0\r\n\r\n",
            "together",
        ),
        (CHUNKED.replace(b"1.1", b"1.0") + b"10\r\n" + BODY + b"\r\n0\r\n\r\n", "HTTP/1.0"),
        (CHUNKED + b"wat\r\n", "chunk header"),
        (CHUNKED + b"10\r\n" + BODY + b"xx", "chunk"),
    ],
)
def test_what_is_no_http_is_a_400_in_openais_shape(server: tuple[str, Service], sent: bytes, words: str) -> None:
    url, service = server
    before = value(service, "http_requests_total", route="none", status="400")
    status, error = refusal_of(url, sent)
    assert (status, error["code"]) == (400, "bad_http") and words in error["message"], error
    assert value(service, "http_requests_total", route="none", status="400") == before + 1


LARGE = b"content-length: 20000000\r\n\r\n" + b" " * 20_000_000


@pytest.mark.parametrize(
    ("settings", "code"),
    [({}, "body_too_large"), ({"api_keys": ("k",)}, "invalid_api_key"), ({"max_header_fields": 2}, "too_many_headers")],
)
def test_an_early_answer_arrives_while_the_body_is_still_being_sent(settings: dict[str, Any], code: str) -> None:
    with on_loopback(FakeEngine(), **settings) as (url, service):
        for _ in range(5):
            assert refusal_of(url, POST + LARGE)[1]["code"] == code
        eventually(lambda: value(service, "http_body_bytes") == 0)


def test_an_answered_connection_closes_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h11, "LINGER_SECONDS", 0.1)
    with on_loopback(FakeEngine(), max_body_bytes=1000) as (url, _), connected(url) as connection:
        connection.sendall(POST + b"content-length: 2000\r\n\r\n")
        assert answered(connection)[0] == 413
        with pytest.raises(OSError):
            for _ in range(1000):
                connection.sendall(b" ")
                time.sleep(0.01)


def test_an_answered_connection_closes_after_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h11, "LINGER_BYTES", 1 << 20)
    with on_loopback(FakeEngine(), max_body_bytes=1000) as (url, _), connected(url) as connection:
        connection.sendall(POST + b"content-length: 2000000000\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(1000):
                connection.sendall(b" " * (1 << 20))


def test_bodies_have_a_number_of_bytes_together() -> None:
    mb = 1 << 20
    engine = FakeEngine()
    with (
        on_loopback(engine, max_body_bytes=2 * mb, max_inflight_body_bytes=4 * mb) as (url, service),
        contextlib.ExitStack() as stack,
    ):
        held = [stack.enter_context(connected(url)) for _ in range(3)]
        for connection in held[:2]:
            connection.sendall(POST + b"content-length: %d\r\n\r\n" % (2 * mb) + b" " * (2 * mb - 100))
        eventually(lambda: value(service, "http_body_bytes") > 3.7 * mb)
        held[2].sendall(POST + b"content-length: %d\r\n\r\n" % (2 * mb) + b" " * (2 * mb - 100))
        status, headers, body = answered(held[2])
        assert (status, body["error"]["code"]) == (503, "too_many_body_bytes") and int(headers[b"retry-after"]) >= 1
        assert str(4 * mb) in body["error"]["message"] and value(service, "http_body_bytes") < 4 * mb
        assert value(service, "requests_rejected_total", reason="too_many_body_bytes") == 1
        assert httpx.post(url + COMPLETIONS, json={"prompt": "short"}).status_code == 200
        for connection in held[:2]:
            connection.sendall(BODY.rjust(100))
            assert status_on(connection) == 200
        eventually(lambda: value(service, "http_body_bytes") == 0)
        late = httpx.post(url + COMPLETIONS, content=BODY.rjust(2 * mb), headers={"content-type": "application/json"})
        assert late.status_code == 200


def test_connections_are_counted_and_probes_have_some_of_their_own() -> None:
    with on_loopback(FakeEngine(), max_connections=2) as (url, service), contextlib.ExitStack() as stack:
        first = [stack.enter_context(connected(url)) for _ in range(2)]
        for connection in first:
            connection.sendall(POST + b"content-length: 16\r\n\r\n" + BODY[:5])
        for path in ("/live", "/health", "/ready", "/metrics"):
            assert httpx.get(url + path).status_code == 200
        over = httpx.post(url + COMPLETIONS, json={"prompt": "hi"})
        assert over.status_code == 503 and over.json()["error"]["code"] == "too_many_connections"
        assert int(over.headers["retry-after"]) >= 1 and "2 connections" in over.json()["error"]["message"]
        waiting = [stack.enter_context(connected(url)) for _ in range(h11.RESERVED_CONNECTIONS)]
        status, error = refusal_of(url, b"")
        assert (status, error["code"]) == (503, "too_many_connections")
        assert value(service, "requests_rejected_total", reason="too_many_connections") == 2
        first[0].sendall(BODY[5:])
        assert status_on(first[0]) == 200, "a connection keeps its place"
        for connection in (*first, *waiting):
            connection.close()
        eventually(lambda: httpx.post(url + COMPLETIONS, json={"prompt": "hi"}).status_code == 200)


LIVE = b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n"


def test_a_connection_between_two_requests_keeps_its_place() -> None:
    with on_loopback(FakeEngine(), max_connections=1) as (url, _), connected(url) as connection:
        for _ in range(3):
            connection.sendall(LIVE)
            assert status_on(connection) == 200
            assert httpx.post(url + COMPLETIONS, json={"prompt": "hi"}).status_code == 503


def test_a_new_connection_takes_the_place_of_the_longest_idle_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h11, "MIN_IDLE_SECONDS", 0.0)
    with on_loopback(FakeEngine(), max_connections=3) as (url, _), contextlib.ExitStack() as stack:
        busy, *idle = [stack.enter_context(connected(url)) for _ in range(3)]
        busy.sendall(POST + b"content-length: 16\r\n\r\n" + BODY[:5])
        for connection in idle:
            connection.sendall(LIVE)
            assert status_on(connection) == 200
        assert httpx.post(url + COMPLETIONS, json={"prompt": "hi"}).status_code == 200
        assert idle[0].recv(1000) == b""
        busy.sendall(BODY[5:])
        idle[1].sendall(LIVE)
        assert status_on(busy) == 200 and status_on(idle[1]) == 200


def test_connections_that_have_been_refused_take_no_place() -> None:
    """They stay for a while, so that the refusal is read."""
    with on_loopback(FakeEngine(), max_connections=1) as (url, _), contextlib.ExitStack() as stack:
        first, *_ = [stack.enter_context(connected(url)) for _ in range(h11.RESERVED_CONNECTIONS + 1)]
        refused = [stack.enter_context(connected(url)) for _ in range(10)]
        assert {connection.recv(13) for connection in refused} == {b"HTTP/1.1 503 "}
        first.close()
        eventually(lambda: httpx.get(url + "/live").status_code == 200)


def test_more_answered_connections_than_files_are_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.app.files_left", lambda _: 3)
    with on_loopback(FakeEngine(), max_body_bytes=1000) as (url, _), contextlib.ExitStack() as stack:
        sending = [stack.enter_context(connected(url)) for _ in range(5)]
        for connection in sending:
            connection.sendall(POST + b"content-length: 2000\r\n\r\n")
            assert connection.recv(13) == b"HTTP/1.1 413 "
        for connection, kept in zip(sending, (True, True, True, False, False), strict=True):
            with contextlib.nullcontext() if kept else pytest.raises(OSError):
                for _ in range(5):
                    connection.sendall(b" ")
                    time.sleep(0.01)


def test_a_client_that_asks_before_it_sends_is_answered_before(server: tuple[str, Service]) -> None:
    with connected(server[0]) as connection:
        connection.sendall(POST + b"content-length: 20000000\r\nexpect: 100-continue\r\n\r\n")
        assert answered(connection)[0] == 413, "and not 100"


def test_those_who_idle_on_a_kept_connection_lose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h11, "RESERVED_HEADER_SECONDS", 0.1)
    with on_loopback(FakeEngine(), max_connections=1) as (url, _), connected(url) as first, connected(url) as idle:
        first.sendall(b"GET /li")
        assert answered(idle)[2]["error"]["code"] == "header_timeout"
        first.sendall(b"ve HTTP/1.1\r\nhost: x\r\n\r\n")
        assert status_on(first) == 200


def test_bytes_that_are_no_chunk_end_a_stream_that_has_begun() -> None:
    """A second answer in the middle of the first would be read as part of it."""
    with on_loopback(FakeEngine()) as (url, _), connected(url) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        assert status_on(connection) == 404
        connection.sendall(b"wat\r\n")
        assert connection.recv(1000) == b""


def test_an_offer_to_upgrade_is_passed_over_in_silence(
    server: tuple[str, Service], caplog: pytest.LogCaptureFixture
) -> None:
    head = b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: %b\r\n\r\n"
    for kind in (b"websocket", b"h2c"):
        with connected(server[0]) as connection:
            connection.sendall(head % kind)
            assert status_on(connection) == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]  # requests may be logged
