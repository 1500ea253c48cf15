"""Chooses the service of a request where several models are served, and has its model loaded while it runs.

A pure-ASGI middleware inside of all others. It reads the body to find the model's name and hands it on unchanged.
"""

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.errors import InvalidRequest, MoedialError, shown
from server.experts.requested_count import merge_extra_body
from server.http.error_responses import error_response
from server.http.incoming import incoming, read_body
from server.http.routes import generate, messages, ollama
from server.http.serving import SERVICE
from server.http.sse import until_disconnect
from server.models.host import HostedModels
from server.requests.json_body import read_json
from server.service import Service

LOADING = frozenset({*generate.PATHS, *messages.PATHS, messages.COUNT, *ollama.PATHS})
LOOKING = frozenset({"/tokenize", "/detokenize", "/api/show"})  # what they need is there without the weights
QUERIED = frozenset({"/calibration", "/tokenizer_info"})  # ?model=NAME


class ModelChoice:
    """Puts the service into the state of each request about one model. `on_refused` is called with each refusal."""

    def __init__(self, app: ASGIApp, models: HostedModels, on_refused: Callable[[Scope, MoedialError], None]) -> None:
        self.app, self.models, self.on_refused = app, models, on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, method = scope["path"], scope["method"]
        if method == "GET" and path in QUERIED:
            return await self._queried(scope, receive, send)
        if method != "POST" or path not in LOADING | LOOKING:
            return await self.app(scope, receive, send)
        async with AsyncExitStack() as held:
            try:
                data = await read_body(Request(scope, receive))
                scope["state"][SERVICE] = service = await self._named(Request(scope, receive), data)
                if path in LOADING:
                    use = self.models.using(service)
                    await until_disconnect(receive, held.enter_async_context(use))
            except MoedialError as error:
                self.on_refused(scope, error)
                return await error_response(error, path)(scope, receive, send)
            receive = _replayed(bytes(data), receive)
            del data  # an answer may take long
            await self.app(scope, receive, send)

    async def _queried(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            scope["state"][SERVICE] = self.models.service_of(Request(scope).query_params.get("model"))
        except MoedialError as error:
            return await error_response(error, scope["path"])(scope, receive, send)
        await self.app(scope, receive, send)

    async def _named(self, request: Request, data: bytearray) -> Service:
        """The service of the model that a body names."""

        async def read() -> bytearray:
            return data

        field = "name" if request.url.path == "/api/show" else "model"  # as Ollama's older clients call it there
        name = await read_json(self.models, incoming(request, read), partial(_name_in, field))
        if name is not None and request.url.path.startswith("/api/"):  # Ollama's API
            name = name.replace(":", "@", 1).removesuffix("@latest")
        return self.models.service_of(name)


def _name_in(other: str, body: Mapping[str, Any]) -> str | None:
    """What a body calls the model, in the field `model` or `other`."""
    merged = merge_extra_body(body)
    name = merged.get("model") or merged.get(other)
    if name is not None and not isinstance(name, str):
        raise InvalidRequest(f"model must be a string, got {shown(name)}", "model")
    return name


def _replayed(data: bytes, receive: Receive) -> Receive:
    """A `receive` that begins with a body that has been read."""
    left: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive_replayed() -> Message:
        return left.pop() if left else await receive()

    return receive_replayed
