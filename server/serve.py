"""Runs the server: loads what needs no torch, starts uvicorn, announces when it is ready, drains on SIGTERM.

It depends on processes and signals, not on requests.
"""

import asyncio
import gc
import shlex
import socket
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
import structlog
import uvicorn
from fastapi import FastAPI

from engine.process.client import EngineClient
from model.errors import CheckpointError, InvalidRequest, MoedialError
from server import logs
from server.access.access import Access
from server.access.keys import warn_if_open
from server.app import app_of, protocol_for
from server.dialects.base import Dialect
from server.dialects.detect import detect, dialect_named
from server.experts.calibration import load_calibration
from server.experts.served_models import ServedModels
from server.experts.sets import load_sets
from server.http.listening import allow_open_files, check_certificate, listen
from server.logs import dropped_line
from server.models.opening import host_models
from server.protocols import EngineProtocol
from server.requests.templates import SandboxedTemplate
from server.schemas.base import GenerationBody, validate
from server.service import Service
from server.settings import Settings
from server.standard_streams import StderrPump, say
from server.state import ServerState
from server.tracing import Tracing
from weights.folder import read_card, resolve_model
from weights.generation import sampling_defaults
from weights.small_files import GENERATION, small_files
from weights.tokenizer import Tokenizer

log = structlog.get_logger("server")
CUT_SECONDS = 2  # after draining, for the last bytes to be read


class ModelServer(uvicorn.Server):
    """uvicorn that announces when the model is ready, exits when it cannot be loaded, and drains before it closes.

    Plain uvicorn closes its listeners at the first signal; this one answers (/ready: 503) until running requests end.
    """

    def __init__(self, config: uvicorn.Config, served: ServerState) -> None:
        super().__init__(config)
        self.served = served
        self.began = time.monotonic()
        self.announced = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, end running requests at the second, exit at once at the third."""
        self.force_exit = self.served.cut_short
        self.served.cut_short = self.served.draining
        self.served.drain()

    async def on_tick(self, counter: int) -> bool:
        if self.served.booted and not self.announced:
            self.announced = True
            gc.collect()
            gc.freeze()  # what is loaded stays; collecting over it took 4 % of a stream's time
            say(ready_text(self.served, self._port(), time.monotonic() - self.began))
        if self.served.drained or self.served.boot_error is not None:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End every request that still runs with an error, which its client has `CUT_SECONDS` to read."""
        stopping: list[asyncio.Task[None]] = []
        if held := self.served.held:
            log.warning("requests are cut off, the time to finish is over", sequences=held)
            stopping.append(asyncio.create_task(self.served.stop(0)))
        await super().shutdown(sockets)
        await asyncio.gather(*stopping)

    def _port(self) -> int:
        """The port that was bound, which --port 0 leaves open."""
        return int(self.servers[0].sockets[0].getsockname()[1])


def run(settings: Settings) -> None:
    """Serve until a signal.

    Raises:
        CannotListen: the host or the port cannot be bound; nothing is loaded.
        CheckpointError: the model cannot be loaded; nothing is served.
        BadCertificate: HTTPS cannot be served.
    """
    sockets = listen(settings.host, settings.port)
    check_certificate(settings.ssl_certfile, settings.ssl_keyfile)
    pump = StderrPump(partial(dropped_line, settings.line_format), whole_lines=not settings.terminal_columns)
    logs.configure(settings.log_level, settings.line_format)
    allow_open_files(settings.max_connections)
    app = load(settings)
    server: ServerState = app.state.service
    pump.on_dropped = lambda count: server.metrics.inc("log_lines_dropped", by=count)
    warn_if_open(settings.host, server.keys)
    ModelServer(config_of(settings, app), server).run(sockets)
    if isinstance(server.boot_error, MoedialError):
        raise server.boot_error
    if server.boot_error is not None:
        raise CheckpointError(f"the model cannot be loaded: {server.boot_error!r}")


def load(settings: Settings) -> FastAPI:
    """The app with everything of its models except weights, which engine processes load once the app starts."""
    if settings.models:
        return app_of(host_models(settings, open_service, engine_for), tracing_of(settings))
    model = resolve_model(settings.model)
    service = open_service(settings, model, engine_for(settings, model), Access.read(settings))
    return app_of(service, tracing_of(settings))


def engine_for(settings: Settings, model: Path) -> EngineClient:
    """The client of an engine process that has not been started."""
    return EngineClient(
        settings.engine_settings(model), hang_seconds=settings.hang_seconds, load_timeout=settings.load_timeout
    )


def tracing_of(settings: Settings) -> Tracing | None:
    return Tracing.from_environment() if settings.otel else None


def open_service(settings: Settings, model: Path, engine: EngineProtocol, access: Access) -> Service:
    """The service of one model, with everything that its small files say.

    Raises:
        CheckpointError: one of them is damaged.
    """
    tokenizer = Tokenizer.load(model, settings.generation_config == "auto", settings.tokenizer_folder)
    defaults = defaults_of(settings, model)
    chat = SandboxedTemplate.load(settings.tokenizer_folder or model)
    dialect = dialect_of(settings, chat, tokenizer)
    calibration = load_calibration(model, settings.name)
    if settings.brownout and calibration.calibration is None:  # before minutes of loading
        raise CheckpointError(f"--brownout needs a calibration: {calibration.reason}")
    card, sets = read_card(model), load_sets(model)
    return Service(settings, engine, tokenizer, chat, card, defaults, dialect, calibration, sets, access)


def dialect_of(settings: Settings, chat: SandboxedTemplate | None, tokenizer: Tokenizer) -> Dialect:
    """How the model writes calls and reasoning: as the setting says, or as its chat template does."""
    template = chat.source if chat else None
    if settings.dialect == "auto":
        return detect(template, tokenizer.specials, tokenizer.added)
    return dialect_named(settings.dialect, tokenizer.specials, tokenizer.added, template)


def defaults_of(settings: Settings, model: Path) -> dict[str, Any]:
    """The checkpoint's own sampling defaults, checked as those of a request are.

    Raises:
        CheckpointError: names the value that is out of its range.
    """
    files = small_files(model, settings.tokenizer_folder)
    defaults = sampling_defaults(files) if settings.generation_config == "auto" else {}
    try:
        validate(GenerationBody, defaults)
    except InvalidRequest as error:
        reason = f"{error.message}; --generation-config none ignores the file"
        raise CheckpointError(f"{model / GENERATION}: {reason}") from None
    if defaults:
        log.info("sampling defaults of the checkpoint", **defaults)
    return defaults


def config_of(settings: Settings, app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=protocol_for(app.state.service),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]  # any number of seconds
        ssl_certfile=settings.ssl_certfile or None,
        ssl_keyfile=settings.ssl_keyfile or None,
        timeout_graceful_shutdown=CUT_SECONDS,
    )


def ready_text(server: ServerState, port: int, seconds: float) -> str:
    """What is printed once models are ready: names, address, two requests and a chat to paste, the page, the docs."""
    settings = server.settings
    models = [one for one in server.listed_models() if not settings.models or one.name in settings.loaded_at_start]
    experts, named = models[0].info.experts, models[0].name if settings.models else None
    url = _url_of(settings, port)
    key = ' -H "authorization: Bearer $KEY"' if server.keys else ""
    curl = f"  curl {url}/v1/completions{key} -H 'content-type: application/json' -d"
    counts = sorted({experts.minimum, min(8, experts.maximum)})
    commands = [f"{curl} {shlex.quote(_body(count, named))}" for count in counts]
    chat = f"  moedial chat --url {url}" + (' --key "$KEY"' if server.keys else "")
    ready = f"ready in {seconds:.1f} s: {', '.join(map(_described, models))} at {url}"
    page = [f"  page: {url}/"] if settings.page == "on" else []
    return "\n".join([ready, *commands, chat, *page, f"  docs: {url}/docs"])


def _described(models: ServedModels) -> str:
    experts = models.info.experts
    return f"{models.name} ({models.info.family}, {experts.minimum} to {experts.maximum} experts per token)"


def _url_of(settings: Settings, port: int) -> str:
    """The address under which this machine reaches the server."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.ssl_certfile else 'http'}://{name}:{port}"


def _body(count: int, model: str | None) -> str:
    named = {"model": model} if model else {}
    body = named | {"prompt": "Once upon a time", "max_tokens": 64, "num_experts": count}
    return orjson.dumps(body).decode()
