"""Sends the answer to a generation call, as server-sent events or whole. Both stop at once when the client disconnects.

Not here: what is in a chunk (see `server/formats`).
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

import orjson
import structlog
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from model.errors import MoedialError
from server.errors import ClientGone
from server.event_loop.slices import in_slices
from server.formats.base import Format, is_long
from server.formats.cost import count_cost
from server.generation.output_processor import Delta
from server.http.h11 import CHUNK_WRITER, ChunkWriter
from server.http.incoming import key_name_of
from server.http.observers import CALL
from server.http.serving import service_of
from server.protocols import TokenizerProtocol
from server.requests.calls import GenerationCall
from server.service import Service

log = structlog.get_logger("server")
Result = TypeVar("Result")
PART_BYTES = 256 << 10  # of a long body, sent at a time
GRACE_SECONDS = 5.0  # beyond the total timeout, for a slow reader to take the last events


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work`, and cancel it as soon as the client disconnects.

    Raises:
        ClientGone: the client has disconnected.
    """
    task, gone = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal gone
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        except Exception as error:
            log.error("internal error", exc_info=error)
        gone = True
        task.cancel()  # it is waiting inside `work`, otherwise this would not run

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if gone and not task.uncancel():
            raise ClientGone("the caller has closed the connection") from None
        raise
    finally:
        watcher.cancel()


async def answer(
    service: Service,
    request: Request,
    call: GenerationCall,
    write: Callable[[GenerationCall, TokenizerProtocol], Format],
) -> Response:
    """The response to an accepted generation call. An error before the first event is still an HTTP error."""
    try:
        format = write(call, service.tokenizer)
        call.generation.start()
        if not call.body.stream:
            return await _whole(service, request, call, format)
        first = await until_disconnect(request.receive, call.generation.next(service.settings.heartbeat))
    except BaseException:
        await _close(request, call)
        raise
    return EventStream(service, request, call, format, first)


async def _whole(service: Service, request: Request, call: GenerationCall, format: Format) -> Response:
    deltas = await until_disconnect(request.receive, _collect(call))
    body = await until_disconnect(request.receive, in_slices(format.body(deltas)))
    await _close(request, call)
    return WholeResponse(orjson.dumps(body), call.headers, service.settings.total_timeout + GRACE_SECONDS)


async def _collect(call: GenerationCall) -> list[Delta]:
    deltas: list[Delta] = []
    while not call.generation.finished:
        deltas += await call.generation.next()
    return deltas


async def _events(
    service: Service, call: GenerationCall, format: Format, first: list[Delta]
) -> AsyncGenerator[bytes, None]:
    """The events of a stream; deltas that arrive together are written together."""
    if opening := await in_slices(format.begin()):
        yield opening
    deltas = first
    try:
        while True:
            written = await in_slices(format.steps_of(deltas)) if is_long(deltas) else format.write(deltas)
            yield written or format.heartbeat
            if call.generation.finished:
                break
            deltas = await call.generation.next(service.settings.heartbeat)
    except Exception as error:
        if not isinstance(error, MoedialError):
            log.error("internal error", exc_info=error)
        yield format.failure(error)  # an end without an error would read as success
        return
    yield format.end()


class WholeResponse(Response):
    """Starlette's Response, but a long body is sent in parts, as fast as the client reads, within `limit` seconds."""

    def __init__(self, body: bytes, headers: dict[str, str], limit: float) -> None:
        super().__init__(body, 200, headers, "application/json")
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(TimeoutError):  # an incomplete body closes the connection
            async with asyncio.timeout(self.limit):
                await self._send(send)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = memoryview(self.body)
        for start in range(0, len(body), PART_BYTES):
            part = bytes(body[start : start + PART_BYTES])
            await send({"type": "http.response.body", "body": part, "more_body": start + PART_BYTES < len(body)})


class EventStream(Response):
    """Starlette's StreamingResponse, but it always closes the call and bounds the time of a slow reader.

    The deltas of a call with one sequence go straight to the connection (`server/http/h11.py`) while that takes them.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        call: GenerationCall,
        format: Format,
        first: list[Delta],
    ) -> None:
        headers = {**call.headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(None, 200, headers, format.media_type)
        del self.headers["content-length"]
        self.events = _events(service, call, format, first)
        self.request, self.call, self.format = request, call, format
        self.limit = service.settings.total_timeout + GRACE_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.limit):
                await until_disconnect(receive, self._send(send))
        except (ClientGone, TimeoutError):
            pass  # the client reads no more; the sequences are aborted below
        finally:
            await _close(self.request, self.call)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        writer: ChunkWriter | None = self.request.scope["state"].get(CHUNK_WRITER)
        if writer is not None and len(self.call.generation.sequences) == 1:
            self.call.generation.write_direct = partial(self._write, writer)
        async with aclosing(self.events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _write(self, writer: ChunkWriter, deltas: list[Delta]) -> bool:
        if writer.paused or deltas[0].prompt is not None:  # log-probabilities of a prompt are written in steps
            return False
        writer.write(self.format.write(deltas) or self.format.heartbeat)
        return True


async def _close(request: Request, call: GenerationCall) -> None:
    """End the generation call and write its log line, which has numbers and never text; its span has the same."""
    await call.generation.close()
    key_name = key_name_of(request)
    key = {"key": key_name} if key_name else {}
    count_cost(service_of(request).metrics, call)
    timelines = [sequence.timeline for sequence in call.generation.sequences]
    passes = call.passes()
    last = max([timeline.last_token_at for timeline in timelines] + [call.arrived])
    figures = {
        "request_id": request.scope["state"].get("request_id"),
        **key,
        "id": call.id,
        "model": call.model,
        "num_experts": call.num_experts,
        "prompt_tokens": sum(used.prompt_tokens for used in passes),
        "completion_tokens": sum(used.completion_tokens for used in passes),
        "outcomes": [timeline.outcome for timeline in timelines],
        "seconds": round(last - call.arrived, 4),
    }
    request.scope["state"][CALL] = figures
    log.info("call", **figures)
