"""Puts the server together: one FastAPI app over one model, or several. Everything it needs is passed in."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from model.errors import MoedialError
from server.access.keys import admin_keys
from server.access.sites import SitePolicy, hosts_of
from server.dialects.base import Dialect
from server.errors import RateLimited, code_of, loggable
from server.experts.calibration import UNCALIBRATED, ServedCalibration
from server.experts.sets import NO_SETS, ServedSets
from server.http import error_responses, openapi
from server.http.auth import RATE_LIMIT_HEADERS, Auth
from server.http.counts import HttpCounts
from server.http.h11 import ConnectionLimits, protocol_of
from server.http.listening import files_left
from server.http.middleware import BodyBudget, BodyLimits, HeadAsGet, OwnPath, RequestId, ReservedConnections, StopGuard
from server.http.model_choice import ModelChoice
from server.http.observers import AccessLog, Spans
from server.http.routes import admin, docs, generate, messages, models, ollama, probes, tokens
from server.http.routes import calibration as calibration_route
from server.http.routes import page as page_routes
from server.http.sites import Sites
from server.models.host import HostedModels
from server.protocols import ChatTemplateProtocol, EngineProtocol, TokenizerProtocol
from server.requests.output_spec import PLAIN
from server.service import Service
from server.settings import Settings
from server.state import ServerState
from server.tracing import Tracing
from server.version import VERSION

log = structlog.get_logger("server")
STOP_SECONDS = 5.0
OWN_HEADERS = (
    "x-request-id",
    "request-id",
    "x-num-experts",
    "x-experts-option",
    "x-skipped-tools",
    "x-ignored-fields",
    "x-should-retry",
)
EXPOSED_HEADERS = (*OWN_HEADERS, "retry-after", *RATE_LIMIT_HEADERS)
# FastAPI's own spans, metrics and records hold queries and the texts of errors, and variables switch their export on
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
ROUTE_MODULES = (calibration_route, docs, generate, messages, models, ollama, probes, tokens)
GENERATING_PATHS = frozenset({*generate.PATHS, *messages.PATHS, *ollama.PATHS})


def create_app(
    settings: Settings,
    engine: EngineProtocol,
    tokenizer: TokenizerProtocol,
    chat: ChatTemplateProtocol | None,
    card: Mapping[str, Any],
    sampling_defaults: Mapping[str, Any] = MappingProxyType({}),
    dialect: Dialect = PLAIN,
    calibration: ServedCalibration = UNCALIBRATED,
    tracing: Tracing | None = None,
    sets: ServedSets = NO_SETS,
) -> FastAPI:
    """The app of one model."""
    return app_of(
        Service(settings, engine, tokenizer, chat, card, sampling_defaults, dialect, calibration, sets), tracing
    )


def app_of(server: ServerState, tracing: Tracing | None = None) -> FastAPI:
    """The app. HTTP answers at once while models load; `server` says how that ended."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        boot = asyncio.create_task(_boot(server))
        try:
            yield
        finally:
            boot.cancel()
            await asyncio.gather(boot, return_exceptions=True)
            last_spans = [] if tracing is None else [asyncio.to_thread(tracing.stop)]
            await asyncio.gather(server.stop(STOP_SECONDS), *last_spans)

    app = FastAPI(
        title="moedial",
        version=VERSION,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own pages load scripts from other sites
        redoc_url=None,
        openapi_url=None,  # `openapi.install` adds the route
        telemetry=NO_TELEMETRY,
    )
    app.state.service = server
    error_responses.install(app)
    openapi.install(app)
    if server.settings.admin_key:
        app.state.admin_keys = admin_keys(server.settings.admin_key, server.keys)
    if isinstance(server, HostedModels):
        app.add_middleware(ModelChoice, models=server, on_refused=partial(_record_refusal, server))
    _add_middleware(app, server)
    _add_observers(app, server.settings, tracing)
    for router in _routers(server.settings):
        app.include_router(router)
    return app


def _routers(settings: Settings) -> list[APIRouter]:
    shown = (page_routes,) if settings.page == "on" else ()
    operators = (admin,) if settings.admin_key else ()
    return [module.router for module in (*ROUTE_MODULES, *operators, *shown)]


async def _boot(server: ServerState) -> None:
    try:
        await server.boot()
    except Exception as error:
        server.boot_error = error  # the command prints it
        if not isinstance(error, MoedialError):
            log.error("internal error", exc_info=error)
    else:
        await server.watch_load()


def _add_middleware(app: FastAPI, server: ServerState) -> None:
    """The last one added is the outermost."""
    settings, on_refused = server.settings, partial(_record_refusal, server)
    budget = BodyBudget(settings.max_inflight_body_bytes)
    server.metrics.watch("http_body_bytes", lambda: budget.held)
    app.add_middleware(
        BodyLimits,
        max_fields=settings.max_header_fields,
        max_bytes=settings.max_body_bytes,
        timeout=settings.body_timeout,
        budget=budget,
    )
    own_keys = (admin.PREFIX,) if settings.admin_key else ()
    on_result = partial(_record_key, server)
    app.add_middleware(Auth, keys=server.keys, accounts=server.accounts, on_result=on_result, own_keys=own_keys)
    app.add_middleware(ReservedConnections, on_refused=on_refused)
    origins = settings.allow_origin
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=EXPOSED_HEADERS,
        )
    hosts = hosts_of(settings.allowed_hosts, settings.host, bool(server.keys))
    policy = SitePolicy(hosts, frozenset(origins), keys=bool(server.keys))
    app.add_middleware(Sites, policy=policy, on_refused=on_refused)
    app.add_middleware(HeadAsGet)
    routes = [*app.routes, *(route for router in _routers(settings) for route in router.routes)]
    app.add_middleware(HttpCounts, routes=routes, count=partial(server.metrics.inc, "http_requests"))
    app.add_middleware(StopGuard)


def _add_observers(app: FastAPI, settings: Settings, tracing: Tracing | None) -> None:
    """What looks at every answer; `RequestId` is outside of them."""
    if tracing is not None:
        app.add_middleware(Spans, paths=GENERATING_PATHS, record=tracing.record)
    if settings.access_log:
        app.add_middleware(AccessLog)
    app.add_middleware(RequestId)
    app.add_middleware(OwnPath)


def protocol_for(server: ServerState) -> type[asyncio.Protocol]:
    """The class of the app's connections, for uvicorn."""
    settings = server.settings
    connections = settings.max_connections
    limits = ConnectionLimits(
        max_connections=connections,
        max_lingering=files_left(connections),
        max_header_bytes=settings.max_header_bytes,
        header_timeout=settings.header_timeout,
        on_refused=server.on_connection_refused,
    )
    return protocol_of(limits)


def _record_key(server: ServerState, scope: Scope, error: MoedialError | None) -> None:
    """Count a request of a key, accepted or refused."""
    key = scope["state"]["key_name"]
    if error is None:
        return server.metrics.inc("key_requests", key)
    if isinstance(error, RateLimited):
        server.metrics.inc("key_requests_limited", key, error.limit)
    _record_refusal(server, scope, error)


def _record_refusal(server: ServerState, scope: Scope, error: MoedialError) -> None:
    """Log a request that is refused before it reaches a route, and count it on the routes that generate."""
    state = scope["state"]
    named = {"key": state["key_name"]} if state.get("key_name") else {}
    log.info("refused", code=code_of(error), reason=loggable(error), request_id=state.get("request_id"), **named)
    if scope["path"] in GENERATING_PATHS:
        server.metrics.inc("requests_rejected", code_of(error))
