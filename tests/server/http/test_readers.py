"""Callers who take their answer slowly, or not at all."""

import contextlib
import json
import socket
import time
from typing import Any

import httpx
import pytest

from server.http import readers, sse
from tests.server import fakes
from tests.server.harness import COMPLETIONS, eventually, on_loopback, value
from tests.server.test_long_answers import SCORED, engine_of, scores

WINDOW = 1 << 16  # bytes that a reader's machine takes for it


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes, "_prompt_logprobs", scores)
    monkeypatch.setattr(readers, "STALLED_SECONDS", 0.4)


def asked(url: str, **more: Any) -> socket.socket:
    """A connection on which an answer of many megabytes begins to come."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    body = json.dumps(SCORED | more).encode()
    lines = (
        f"POST {COMPLETIONS} HTTP/1.1",
        "host: x",
        "content-type: application/json",
        f"content-length: {len(body)}",
    )
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection


def size_of(connection: socket.socket) -> int:
    """How long an answer is, by its head, which is taken."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += connection.recv(1)
    return int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])


def taken(connection: socket.socket, pause: float = 0.0) -> int:
    """How many bytes come until the other side closes."""
    count = 0
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(WINDOW):
            count += len(part)
            time.sleep(pause)
    return count


def status_of_no_probe(url: str) -> int:
    """A request that needs a place among the connections."""
    return httpx.post(f"{url}/tokenize", json={"prompt": "hi"}).status_code


@pytest.mark.parametrize("streamed", [False, True])
def test_who_takes_nothing_loses_the_connection(streamed: bool) -> None:
    with on_loopback(engine_of(2_000), max_connections=1) as (url, service), asked(url, stream=streamed):
        eventually(lambda: value(service, "request_success_total") == 64)
        eventually(lambda: status_of_no_probe(url) == 200, 20)


def test_who_takes_something_gets_everything() -> None:
    with on_loopback(engine_of(2_000), keep_alive=0.5) as (url, _), asked(url) as slow:
        size = size_of(slow)
        assert size > 10_000_000
        assert taken(slow, 0.005) == size


def test_an_answer_that_takes_too_long_to_be_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "GRACE_SECONDS", -4.0)
    with on_loopback(engine_of(2_000), total_timeout=5.0) as (url, _), asked(url) as slow:
        size, count, end = size_of(slow), 0, time.monotonic() + 2.0
        while time.monotonic() < end:
            count += len(slow.recv(1 << 14))
            time.sleep(0.05)
        assert count + taken(slow) < size
