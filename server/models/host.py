"""Several models in one server: finds the one that a request names, and has it loaded while the request runs."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from model.errors import EngineDown, shown
from server.access.access import Access
from server.errors import ModelNotFound
from server.experts.served_models import ServedModels
from server.models.exposition import merged_exposition
from server.models.hosted import HostedModel
from server.models.memory import ModelMemory
from server.service import Service
from server.settings import Settings
from server.state import ServerState

NO_MODEL = ""  # the label of what is counted before it is known which model a request names


class HostedModels(ServerState):
    """The state of a server of several models. The first one answers requests that name none."""

    def __init__(self, settings: Settings, access: Access, hosted: Sequence[HostedModel]) -> None:
        super().__init__(settings, NO_MODEL, access)
        self._hosted = {one.name: one for one in hosted}
        self._memory = ModelMemory(hosted, settings.models_memory)
        self._booted = False

    async def boot(self) -> None:
        """Load the models to be loaded at start, one after the other."""
        for name in self.settings.loaded_at_start:
            async with self._memory.using(name):
                pass
        self._booted = True

    async def watch_load(self) -> None:
        """Each model watches its own load."""

    async def stop(self, timeout: float) -> None:
        await self._memory.stop()
        await asyncio.gather(*(one.stop(timeout) for one in self._hosted.values()))

    @property
    def booted(self) -> bool:
        return self._booted

    @property
    def held(self) -> int:
        return sum(one.service.admission.held for one in self._hosted.values())

    def drain(self) -> None:
        super().drain()
        for one in self._hosted.values():
            one.service.drain()

    def check_ready(self) -> None:
        if self.booted and self.draining:
            raise EngineDown("the server is shutting down; try another one")
        self.check_engine()

    def check_engine(self) -> None:
        """Of a model that was unloaded since, no answer is expected; of one in memory it is."""
        if not self.booted:
            raise EngineDown("the models are still being loaded; try again later")
        for name, one in self._hosted.items():
            if self._memory.state(name) == "loaded" and name in self.settings.loaded_at_start:
                one.service.check_engine()

    def service_of(self, model: str | None) -> Service:
        """The service of the model, or alias, that a request names; where it names none, of the first one.

        Raises:
            ModelNotFound: there is no such model, or it has no such alias.
        """
        if model is None:
            return next(iter(self._hosted.values())).service
        name, is_alias, _ = model.partition("@")
        if name not in self._hosted:
            names = ", ".join(map(repr, self._hosted))
            raise ModelNotFound(f"the model {shown(model, 128)} does not exist; this server has {names}", "model")
        if is_alias:
            self._hosted[name].models.requested_in_alias(model)
        return self._hosted[name].service

    @asynccontextmanager
    async def using(self, service: Service, again: bool = False) -> AsyncIterator[None]:
        """Keep a model in memory, which is loaded first where it is not there.

        Raises:
            ModelsBusy: there is no room beside the models in use.
            EngineDown: it cannot be loaded, or the server is shutting down.
        """
        if self.draining:
            raise EngineDown("the server is shutting down; try another one")
        async with self._memory.using(service.settings.name, again):
            yield

    async def unload(self, service: Service) -> None:
        """Take a model out of memory. Raises ModelInUse."""
        await self._memory.unload(service.settings.name)

    def listed_models(self) -> list[ServedModels]:
        return [one.models for one in self._hosted.values()]

    def loaded_models(self) -> list[ServedModels]:
        return [one.models for name, one in self._hosted.items() if self._memory.state(name) == "loaded"]

    def model_cards(self) -> list[dict[str, Any]]:
        """The cards of all models; `meta.loaded` says whether a model is in memory."""
        return [self._marked(card) for one in self._hosted.values() for card in one.models.cards()]

    def model_card(self, model: str) -> dict[str, Any]:
        name = self.service_of(model).settings.name
        return self._marked(self._hosted[name].models.card(model))

    def residence(self, service: Service) -> dict[str, Any]:
        """Where a model stands, as the operator's routes say it."""
        name = service.settings.name
        return {"id": name, "state": self._memory.state(name), "memory_bytes": self._hosted[name].bytes}

    def residences(self) -> list[dict[str, Any]]:
        return [self.residence(one.service) for one in self._hosted.values()]

    def exposition(self) -> bytes:
        loaded = {name for name in self._hosted if self._memory.state(name) == "loaded"}
        services = [(name in loaded, one.service.metrics) for name, one in self._hosted.items()]
        return merged_exposition(self.metrics, services)

    def _marked(self, card: dict[str, Any]) -> dict[str, Any]:
        loaded = self._memory.state(card["root"]) == "loaded"
        return card | {"meta": card["meta"] | {"loaded": loaded}}
