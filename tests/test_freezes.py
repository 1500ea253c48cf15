"""The poller beside the server's tests sees what it is there for."""

import time

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from tests.freezes import watch_app

LONG = 0.5  # seconds that one request computes


def _app() -> FastAPI:
    app = FastAPI()
    kept: list[bytes] = []

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.get("/computes")
    async def computes() -> None:
        until = time.thread_time() + LONG
        while time.thread_time() < until:
            pass

    @app.get("/takes")
    async def takes() -> None:
        kept.append(b"x" * (64 << 20))

    return app


def test_a_request_that_computes_on_the_event_loop_is_a_freeze() -> None:
    watch = watch_app(app := _app())
    with TestClient(app) as client:
        client.get("/computes")
        time.sleep(0.1)
    with pytest.raises(AssertionError, match="answered late"):
        watch.check()


def test_memory_that_a_request_takes_is_seen() -> None:
    watch = watch_app(app := _app())
    with TestClient(app) as client:
        client.get("/takes")
        time.sleep(0.5)
    watch.check()
    with pytest.raises(AssertionError, match="MiB more"):
        watch.check(growth=16 << 20)


def test_a_quiet_server_passes_whatever_the_test_computes() -> None:
    watch = watch_app(app := _app())
    with TestClient(app) as client:
        until = time.thread_time() + LONG
        while time.thread_time() < until:
            client.get("/health")
    watch.check()
    assert watch.questions > 5
