"""Puts the pieces together: one FastAPI app over one engine. Everything it needs is handed to it."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import structlog
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from model.errors import MoedialError
from server.access.sites import SitePolicy, hosts_of
from server.dialects.base import Dialect
from server.errors import RateLimited, code_of
from server.http import error_responses, openapi
from server.http.auth import LEVEL_HEADERS, Auth
from server.http.counts import HttpCounts
from server.http.h11 import ConnectionLimits, protocol_of
from server.http.listening import files_left
from server.http.middleware import BodyBudget, Cut, HeadAsGet, Limits, RequestId, Reserve
from server.http.routes import docs, generate, models, probes, tokens
from server.http.sites import Sites
from server.protocols import ChatTemplate, Engine, Tokenizer
from server.requests.output_spec import PLAIN
from server.service import Service
from server.settings import Settings
from server.version import VERSION

log = structlog.get_logger("server")
STOP_SECONDS = 5.0
PARTS = (docs, generate, models, probes, tokens)


def create_app(
    settings: Settings,
    engine: Engine,
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    card: Mapping[str, Any],
    sampling_defaults: Mapping[str, Any] = MappingProxyType({}),
    dialect: Dialect = PLAIN,
) -> FastAPI:
    """The app. HTTP answers at once; the model loads beside it, and `Service` says how that ended."""
    service = Service(settings, engine, tokenizer, chat, card, sampling_defaults, dialect)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        boot = asyncio.create_task(_boot(service))
        try:
            yield
        finally:
            boot.cancel()
            await asyncio.gather(boot, return_exceptions=True)
            await engine.stop(STOP_SECONDS)

    app = FastAPI(
        title="moedial",
        version=VERSION,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own pages load their scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    error_responses.install(app)
    openapi.install(app)
    _add_middleware(app, service)
    for part in PARTS:
        app.include_router(part.router)
    return app


async def _boot(service: Service) -> None:
    try:
        await service.boot()
    except Exception as error:
        service.boot_error = error  # the command says it, once
        if not isinstance(error, MoedialError):
            log.error("internal error", exc_info=error)


def _add_middleware(app: FastAPI, service: Service) -> None:
    """The last one added is the outermost."""
    settings, note = service.settings, partial(_note_refused, service)
    budget = BodyBudget(settings.max_inflight_body_bytes)
    service.metrics.watch("http_body_bytes", lambda: budget.held)
    app.add_middleware(
        Limits,
        max_fields=settings.max_header_fields,
        max_bytes=settings.max_body_bytes,
        timeout=settings.body_timeout,
        budget=budget,
    )
    app.add_middleware(Auth, keys=service.keys, accounts=service.accounts, note=partial(_note_key, service))
    app.add_middleware(Reserve, note=note)
    origins = settings.allow_origin
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=("x-request-id", "x-num-experts", "x-should-retry", "retry-after", *LEVEL_HEADERS),
        )
    hosts = hosts_of(settings.allowed_hosts, settings.host, bool(service.keys))
    policy = SitePolicy(hosts, frozenset(origins), keys=bool(service.keys))
    app.add_middleware(Sites, policy=policy, on_refused=note)
    app.add_middleware(HeadAsGet)
    routes = [*app.routes, *(route for part in PARTS for route in part.router.routes)]
    app.add_middleware(HttpCounts, routes=routes, count=partial(service.metrics.inc, "http_requests"))
    app.add_middleware(Cut)
    app.add_middleware(RequestId)


def protocol_for(service: Service) -> type[asyncio.Protocol]:
    """The class of the app's connections, for uvicorn."""
    settings = service.settings
    return protocol_of(
        ConnectionLimits(
            max_connections=settings.max_connections,
            max_answered=files_left(settings.max_connections),
            max_header_bytes=settings.max_header_bytes,
            header_timeout=settings.header_timeout,
            on_refused=service.on_connection_refused,
        )
    )


def _note_key(service: Service, scope: Scope, error: MoedialError | None) -> None:
    """Count a request that a key has made or been refused."""
    key = scope["state"]["key_name"]
    if error is None:
        return service.metrics.inc("key_requests", key)
    if isinstance(error, RateLimited):
        service.metrics.inc("key_requests_limited", key, error.limit)
    _note_refused(service, scope, error)


def _note_refused(service: Service, scope: Scope, error: MoedialError) -> None:
    """Log a request that is refused before it has a route, and count it where it asks for an answer."""
    state = scope["state"]
    named = {"key": state["key_name"]} if state.get("key_name") else {}
    log.info("refused", code=code_of(error), reason=str(error), request_id=state.get("request_id"), **named)
    if scope["path"] in generate.PATHS:
        service.metrics.inc("requests_rejected", code_of(error))
