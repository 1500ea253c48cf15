"""A server of several fake models, in memory."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient

from server.access.access import Access
from server.app import app_of
from server.experts.served_models import ServedModels
from server.models.engine import ReloadableEngine
from server.models.host import HostedModels
from server.models.hosted import HostedModel
from server.requests.output_spec import PLAIN
from server.service import Service
from server.settings import Settings
from tests.freezes import watch_app
from tests.server.fakes import INFO, FakeChat, FakeEngine, FakeTokenizer
from tests.server.harness import CARD, eventually

BYTES = 10  # of each model


def app_of_models(engines: dict[str, FakeEngine], **settings: Any) -> FastAPI:
    """The app over these engines, by the names of their models."""
    given = Settings(models=dict.fromkeys(engines, "."), kv_cache_bytes=1, **settings)
    access = Access.read(given)
    hosted = [_hosted(given.of_model(name), engine, access) for name, engine in engines.items()]
    app = app_of(HostedModels(given, access, hosted))
    watch_app(app)
    return app


def _hosted(settings: Settings, fake: FakeEngine, access: Access) -> HostedModel:
    engine = ReloadableEngine(lambda: fake)
    service = Service(settings, engine, FakeTokenizer(), FakeChat(), CARD, {}, PLAIN, access=access)
    return HostedModel(service, engine, BYTES, ServedModels.build(settings, replace(INFO, kernels=""), CARD, 0))


@contextlib.contextmanager
def several(engines: dict[str, FakeEngine], **settings: Any) -> Iterator[TestClient]:
    app = app_of_models(engines, **settings)
    with TestClient(app) as client:
        eventually(lambda: app.state.service.booted)
        yield client
    app.state.watch.check()
