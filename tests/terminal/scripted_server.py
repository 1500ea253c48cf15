"""Servers for the terminal to meet: the real one with a fake engine is tests/server/harness.py's; here is one that
sends whatever a test tells it, on a loopback port in a thread."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner, Result

from server.cli import app
from tests.server.harness import eventually

MOE = {"min": 1, "max": 8, "default": 4, "trained": 4, "layers": 3}
CARDS = {"data": [{"id": "odd", "meta": {"moe": MOE}}, {"id": "dense", "meta": {"moe": {"layers": 0}}}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "num_experts": 4}
DONE = b"data: [DONE]\n\n"


def event(chunk: Any) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def delta(**fields: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})


def ending(**usage: Any) -> bytes:
    return event({"choices": [], "usage": USAGE | usage}) + DONE


def stream(*parts: bytes) -> Response:
    return StreamingResponse(iter(parts), media_type="text/event-stream")


@dataclass
class Stranger:
    """`answers` are taken in turn, the last for ever; `bodies` is what was asked."""

    answers: list[Callable[[], Response]]
    cards: Any = field(default_factory=lambda: CARDS)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    async def models(self, _: Request) -> Response:
        return JSONResponse(self.cards, 200 if self.cards else 404)

    async def generate(self, request: Request) -> Response:
        self.bodies.append(json.loads(await request.body()))
        return (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])()


@contextlib.contextmanager
def stranger(*answers: Callable[[], Response], **fields: Any) -> Iterator[Stranger]:
    met = Stranger(list(answers), **fields)
    routes = [Route("/v1/models", met.models)]
    routes += [Route(f"/v1/{path}", met.generate, methods=["POST"]) for path in ("chat/completions", "completions")]
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            eventually(lambda: server.started)
            met.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield met
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)


def closed_port() -> str:
    """An address where nobody listens."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def moedial(*words: str, lines: str | bytes = "", attended: bool = False, env: Any = None) -> Result:
    """The real command, in this process; `lines` are piped into it, or typed by a person who reads what comes."""
    with patch("terminal.chat.at_terminal", return_value=attended):
        return CliRunner().invoke(app, list(words), input=lines, env={"COLUMNS": "200"} | (env or {}))
