"""python -m tests.page.fake_server: the server with a fake engine, in the main venv. It prints its address.

What a prompt begins with says what the engine does: `say:` repeats the rest, `slow:` takes its time. Else the answer
names the count. On standard input, `down` and `up` stop and start the engine.
"""

import argparse
import asyncio
import os
import socket
import sys
import threading
from collections.abc import AsyncGenerator
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.types import Request, TokenEvent
from server.protocols import EngineState
from server.serve import config_of
from tests.page.running import COMMON
from tests.server.calibrations import calibration
from tests.server.fakes import EOS, FakeChat, FakeEngine
from tests.server.harness import app_of

PAUSE_S = 0.02
STATES: dict[str, EngineState] = {"down": "restarting", "up": "ready"}


def script(request: Request) -> list[int]:
    """The tokens of an answer."""
    prompt = bytes(id for id in request.prompt if id < EOS).decode(errors="replace")
    _, told, rest = prompt.rpartition("say:")
    text = rest.removesuffix("<assistant>") if told else f"{COMMON}{request.budget.uniform} experts."
    return [*text.encode(), EOS]


class PageEngine(FakeEngine):
    """A fake engine that can be slow."""

    async def _events(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        slow = b"slow:" in bytes(id for id in request.prompt if id < EOS)
        async for event in super()._events(request):
            await asyncio.sleep(PAUSE_S if slow else 0)
            yield event


class Prefixed:
    """Serves an app under a path prefix, as a reverse proxy does, and nothing else."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app, self.prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            inside = scope["path"].startswith(self.prefix + "/")
            scope = {**scope, "path": scope["path"].removeprefix(self.prefix) if inside else "/outside/of/the/prefix"}
        await self.app(scope, receive, send)


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prefix", default="")
    parser.add_argument("--key", default="")
    parser.add_argument("--no-chat", action="store_true")
    options = parser.parse_args()
    engine = PageEngine(script)
    settings: dict[str, Any] = {"return_routed_experts": True, "api_keys": (options.key,) if options.key else ()}
    app = app_of(engine, None if options.no_chat else FakeChat(), calibration(), **settings)
    config = config_of(app.state.service.settings, app)
    config.app = Prefixed(app, options.prefix) if options.prefix else app
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        print(f"http://127.0.0.1:{listener.getsockname()[1]}{options.prefix}/", flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # log lines follow, which nothing reads
        for line in sys.stdin:
            engine.state = STATES.get(line.strip(), engine.state)
        server.should_exit = True
        thread.join(10)


if __name__ == "__main__":
    main()
