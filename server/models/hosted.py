"""One of several models: its service, what it takes in memory, and how it is loaded and unloaded."""

import asyncio

from server.experts.served_models import ServedModels
from server.models.engine import ReloadableEngine
from server.service import Service

STOP_SECONDS = 1.0  # that an engine without requests may take to end


class HostedModel:
    """A service whose engine is started and stopped, while its metrics and what was read of small files stay."""

    def __init__(self, service: Service, engine: ReloadableEngine, bytes: int, expected: ServedModels) -> None:
        """`expected`: what is known of the model from its config.json, before it is loaded."""
        self.service, self.bytes = service, bytes
        service.expected = expected
        self._engine = engine
        self._watch: asyncio.Task[None] | None = None
        service.metrics.watch("engine_restarts", lambda: engine.restarts - engine.reloads)

    @property
    def name(self) -> str:
        return self.service.settings.name

    @property
    def models(self) -> ServedModels:
        """The model and its aliases, as it was last loaded."""
        return self.service.described

    async def load(self) -> None:
        """Start the engine and wait for the model. Raises MoedialError."""
        try:
            await self.service.boot()
        except BaseException:
            await self._engine.stop(0)
            raise
        self._watch = asyncio.create_task(self.service.watch_load(), name=f"watch the load of {self.name}")

    async def unload(self) -> None:
        """Stop the engine, which has no requests."""
        await self.stop(STOP_SECONDS)

    async def stop(self, timeout: float) -> None:
        """Stop the engine. What runs has `timeout` seconds to end."""
        if self._watch is not None:
            self._watch.cancel()
        await self._engine.stop(timeout)
