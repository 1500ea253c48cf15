"""Runs the server: loads what is torch-free here, starts uvicorn, says when it is ready, drains on SIGTERM.

It knows processes and signals, not requests.
"""

import shlex
import time
from types import FrameType

import orjson
import uvicorn
from fastapi import FastAPI
from weights.chat import ChatTemplate
from weights.folder import read_card, resolve_model
from weights.tokenizer import Tokenizer

from engine.client import EngineClient
from model.errors import CheckpointError, MoedialError
from server import logs
from server.app import create_app
from server.protocol import with_header_deadline
from server.service import Service
from server.settings import Settings

CUT_SECONDS = 2  # after draining, for the last bytes to be read


class DrainingServer(uvicorn.Server):
    """uvicorn closes its listeners at the first signal; this keeps answering (/ready: 503) until requests are done."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            self.should_exit = self.force_exit = True
        self.service.drain()

    async def on_tick(self, counter: int) -> bool:
        if self.service.drained:
            self.should_exit = True
        return await super().on_tick(counter)


def run(settings: Settings) -> None:
    """Serve until a signal.

    Raises:
        CheckpointError: the model cannot be loaded; nothing is served.
    """
    logs.configure(settings.log_level)
    started = time.monotonic()
    folder = resolve_model(settings.model)
    engine = EngineClient(settings.engine_settings(folder))
    failures: list[Exception] = []

    def on_boot(service: Service, failure: Exception | None) -> None:
        if failure is None:
            print(ready_text(service, server_port(server) or settings.port, time.monotonic() - started), flush=True)
        else:
            failures.append(failure)
            server.should_exit = True

    tokenizer, chat = Tokenizer.load(folder), ChatTemplate.load(folder)
    app = create_app(settings, engine, tokenizer, chat, read_card(folder), on_boot)
    server = DrainingServer(config_of(settings, app), app.state.service)
    server.run()
    if failures:
        raise failures[0] if isinstance(failures[0], MoedialError) else CheckpointError(repr(failures[0]))


def config_of(settings: Settings, app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=with_header_deadline(settings.header_timeout),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_graceful_shutdown=CUT_SECONDS,
    )


def ready_text(service: Service, port: int, seconds: float) -> str:
    """One line that says what is served, and two commands to paste."""
    settings, catalogue = service.settings, service.catalogue
    experts = catalogue.info.experts
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1/completions"
    key = ' -H "authorization: Bearer $KEY"' if settings.api_keys else ""
    counts = sorted({experts.minimum, min(8, experts.maximum)})
    commands = [f"  curl {url}{key} -H 'content-type: application/json' -d {shlex.quote(_body(n))}" for n in counts]
    what = f"{catalogue.name} ({catalogue.info.family}, {experts.minimum} to {experts.maximum} experts per token)"
    return "\n".join([f"ready in {seconds:.1f} s: {what}", *commands])


def _body(count: int) -> str:
    body = {"prompt": "Once upon a time", "max_tokens": 64, "num_experts": count}
    return orjson.dumps(body).decode()


def server_port(server: uvicorn.Server) -> int | None:
    """The port that was really bound, which --port 0 leaves open."""
    sockets = [socket for listener in getattr(server, "servers", []) for socket in listener.sockets]
    return int(sockets[0].getsockname()[1]) if sockets else None
