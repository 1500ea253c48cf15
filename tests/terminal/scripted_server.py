"""A server that answers as a test tells it, on a loopback port in a thread, and the command run against it.

The real server with a fake engine is in tests/server/harness.py.
"""

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
class ScriptedServer:
    """Sends `answers` in order, and the last one again and again; `bodies` are the requests it got."""

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
def scripted_server(*answers: Callable[[], Response], **fields: Any) -> Iterator[ScriptedServer]:
    scripted = ScriptedServer(list(answers), **fields)
    routes = [Route("/v1/models", scripted.models)]
    for path in ("chat/completions", "completions"):
        routes.append(Route(f"/v1/{path}", scripted.generate, methods=["POST"]))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            eventually(lambda: server.started)
            scripted.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield scripted
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)


def closed_port() -> str:
    """An address on which nothing listens."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def moedial(*words: str, lines: str | bytes = "", interactive: bool = False, env: Any = None) -> Result:
    """Run the command in this process; `lines` are piped into it, or typed at a terminal if `interactive`."""
    with patch("terminal.chat.at_terminal", return_value=interactive):
        return CliRunner().invoke(app, list(words), input=lines, env={"COLUMNS": "200"} | (env or {}))
