"""`ServerState`: what every server process has, with one model or several: keys, counters, and whether it accepts work.

Not here: models (see `server/service.py` for one, `server/models` for several) and routes (see `server/http/routes`).
"""

import time
from abc import ABC, abstractmethod
from typing import Any

from model.errors import MoedialError
from server.access.access import Access
from server.errors import TooManyConnections, code_of, http_error_of
from server.event_loop.thread_pools import BoundedThreadPool
from server.experts.served_models import ServedModels
from server.metrics import NO_ROUTE, Metrics
from server.settings import Settings


class ServerState(ABC):
    """A server from loading to draining, as its app and its process see it."""

    def __init__(self, settings: Settings, model_name: str, access: Access) -> None:
        """`model_name`: the model label of the metrics counted here."""
        self.settings, self.access = settings, access
        self.keys, self.accounts = access.keys, access.accounts
        self.metrics = Metrics(model_name)
        self.body_parsing = BoundedThreadPool("large bodies", 2, settings.max_connections)
        self.boot_error: Exception | None = None  # why a model that has to be there could not be loaded
        self.drain_started: float | None = None
        self.cut_short = False  # whether a second signal ended the wait for running requests

    @abstractmethod
    async def boot(self) -> None:
        """Load what is loaded at start, and wait for it. Raises MoedialError."""

    @abstractmethod
    async def watch_load(self) -> None:
        """Run the periodic work of a started server; it may return early."""

    @abstractmethod
    async def stop(self, timeout: float) -> None:
        """Stop every engine. What runs has `timeout` seconds to end."""

    @property
    @abstractmethod
    def booted(self) -> bool:
        """Whether everything that is loaded at start has been loaded."""

    @property
    @abstractmethod
    def held(self) -> int:
        """Sequences of requests that have not ended."""

    @abstractmethod
    def check_ready(self) -> object:
        """Raises EngineDown with the reason where no work is accepted."""

    @abstractmethod
    def check_engine(self) -> object:
        """Raises EngineDown with the reason while a model that has to be there cannot answer."""

    @abstractmethod
    def listed_models(self) -> list[ServedModels]:
        """Every model with its aliases. Raises EngineDown while none is known."""

    @abstractmethod
    def loaded_models(self) -> list[ServedModels]:
        """The models in memory. Raises EngineDown while none is known."""

    @abstractmethod
    def model_cards(self) -> list[dict[str, Any]]:
        """The entries of /v1/models."""

    @abstractmethod
    def model_card(self, model: str) -> dict[str, Any]:
        """The entry of a model or an alias. Raises ModelNotFound."""

    @abstractmethod
    def exposition(self) -> bytes:
        """The answer to a scrape."""

    @property
    def draining(self) -> bool:
        return self.drain_started is not None

    def drain(self) -> None:
        """Accept no more work. It only sets a flag, so that a signal handler may call it."""
        if self.drain_started is None:
            self.drain_started = time.monotonic()

    @property
    def drained(self) -> bool:
        """Whether all requests have ended, or the time for them is over."""
        if self.drain_started is None:
            return False
        overdue = time.monotonic() - self.drain_started > self.settings.drain_seconds
        return self.cut_short or self.held == 0 or overdue

    def on_connection_refused(self, error: MoedialError) -> None:
        """Count a refusal that was sent before there was a request with a path."""
        self.metrics.inc("http_requests", NO_ROUTE, NO_ROUTE, str(http_error_of(error).status))
        if isinstance(error, TooManyConnections):
            self.metrics.inc("requests_rejected", code_of(error))
