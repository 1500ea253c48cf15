"""A server to test: in memory with Starlette's client, or with uvicorn on a loopback port in a thread.

Beside every request runs a poller that fails the test when the server stalls or takes too much memory
(`tests/freezes.py`).
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import structlog
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.app import create_app
from server.experts.calibration import UNCALIBRATED, ServedCalibration
from server.experts.sets import NO_SETS, ServedSets
from server.serve import config_of
from server.service import Service
from server.settings import Settings
from tests.freezes import watch_app
from tests.server.fakes import FakeChat, FakeEngine, FakeTokenizer
from weights.calibration import Calibration

CARD = {"quality": [{"num_experts": 1, "perplexity": 9.0}, {"num_experts": 8, "perplexity": 7.5}]}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENDS = ("request_success_total", "requests_failed_total", "requests_aborted_total", "requests_rejected_total")

# As the server writes them, without the pictures of tracebacks that structlog draws by default, 0.15 CPU seconds each.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(default=repr),
    ]
)


def app_of(
    engine: FakeEngine,
    chat: FakeChat | None = None,
    calibration: Calibration | None = None,
    sets: ServedSets = NO_SETS,
    **settings: Any,
) -> FastAPI:
    options = Settings(model="tiny", **settings)
    served = UNCALIBRATED if calibration is None else ServedCalibration(calibration, "")
    app = create_app(options, engine, FakeTokenizer(), chat, CARD, calibration=served, sets=sets)
    watch_app(app)
    return app


@contextlib.contextmanager
def in_memory(engine: FakeEngine | None = None, with_chat: bool = True, **settings: Any) -> Iterator[TestClient]:
    app = app_of(engine or FakeEngine(), FakeChat() if with_chat else None, **settings)
    with TestClient(app) as client:
        eventually(lambda: service_of(client).loaded is not None)
        yield client
    app.state.watch.check()


def key_file(folder: Path, text: str, mode: int = 0o600) -> str:
    """The path of a file of API keys."""
    path = folder / "keys.toml"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def service_of(client: TestClient) -> Service:
    service = client.app.state.service  # type: ignore[attr-defined]
    assert isinstance(service, Service)
    return service


def eventually(check: Any, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


@contextlib.contextmanager
def on_loopback(engine: FakeEngine, with_chat: bool = True, **settings: Any) -> Iterator[tuple[str, Service]]:
    """Yields the base address and the service behind it."""
    app = app_of(engine, FakeChat() if with_chat else None, **settings)
    config = config_of(app.state.service.settings, app)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            eventually(lambda: server.started and app.state.service.loaded is not None)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.service
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
            assert not thread.is_alive()
    app.state.watch.check()


def value(service: Service, name: str, **labels: str) -> float:
    """The sum of a series over every label that is not given."""
    total = 0.0
    for family in service.metrics.registry.collect():
        for sample in family.samples:
            if sample.name == f"moedial:{name}" and labels.items() <= sample.labels.items():
                total += sample.value
    return total


def frames(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]


def ended(service: Service) -> float:
    """How many sequences, and refused requests, have come to an end."""
    return sum(value(service, name) for name in ENDS)


@contextlib.contextmanager
def in_background(count: int, url: str, body: dict[str, Any]) -> Iterator[list[httpx.Response]]:
    """Sends `count` requests at once; the answers are complete after the block.

    One client sends them all: making one loads certificates, whose processor time would count as the server's.
    """
    answers: list[httpx.Response] = []
    with httpx.Client(verify=False, limits=httpx.Limits(max_connections=count)) as client:
        send = lambda: answers.append(client.post(url, json=body, timeout=20))  # noqa: E731
        threads = [threading.Thread(target=send) for _ in range(count)]
        for thread in threads:
            thread.start()
        yield answers
        for thread in threads:
            thread.join(20)
