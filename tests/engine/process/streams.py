"""A request to an engine client as a stream of events, for tests that read one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from engine.process.client import EngineClient
from engine.types import Request, TimedEvent, TokenEvent
from model.errors import MoedialError


async def generate(client: EngineClient, request: Request) -> AsyncGenerator[TokenEvent, None]:
    """Run a request and yield its events, the last one with `finish`. Closing the generator early aborts it.

    Raises what `EngineClient.submit` raises, and what ends the request.
    """
    arrivals: asyncio.Queue[Sequence[TimedEvent] | MoedialError] = asyncio.Queue()
    client.submit(request, arrivals.put_nowait)
    ended = False
    try:
        while not ended:
            found = await arrivals.get()
            if isinstance(found, MoedialError):
                ended = True
                raise found
            for event, _ in found:
                ended = event.finish is not None
                yield event
    finally:
        if not ended:
            client.abort(request.id)
