"""Which of several models are in memory: one is loaded when it is asked for, idle ones are unloaded to make room.

It depends on names, sizes and functions that load, not on engines or HTTP. Use it from one event loop only. Decisions
are made without waiting, so that no lock is needed: a model that is to be loaded counts at once, and its load waits for
the unloads that were begun before.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Literal, Protocol

import structlog

from model.errors import EngineDown, MoedialError
from server.errors import ModelInUse, ModelsBusy

log = structlog.get_logger("server")
AGAIN_SECONDS = 30.0  # how long requests for a model that could not be loaded are refused with the same reason
State = Literal["absent", "loading", "loaded", "unloading"]


class Loadable(Protocol):
    """A model that can be loaded and unloaded, again and again. A load that fails leaves nothing behind."""

    @property
    def name(self) -> str: ...

    @property
    def bytes(self) -> int:
        """What it takes in memory."""

    async def load(self) -> None: ...

    async def unload(self) -> None: ...


class _Slot:
    """A model and what is known of it."""

    def __init__(self, model: Loadable) -> None:
        self.model = model
        self.state: State = "absent"
        self.users = 0  # requests that use it or wait for it
        self.used_at = 0  # a number that grows with every use
        self.task: asyncio.Task[None] | None = None  # of the load or unload that was begun last
        self.failure, self.failed_at = "", 0.0  # of the last load

    @property
    def claims(self) -> bool:
        """Whether the memory is its own from now on."""
        return self.state in ("loading", "loaded")


class ModelMemory:
    """The models in memory, together never more than `limit` bytes; 0: no limit."""

    def __init__(self, models: Iterable[Loadable], limit: int) -> None:
        self._slots = {model.name: _Slot(model) for model in models}
        self._limit = limit
        self._uses = itertools.count(1)

    def state(self, name: str) -> State:
        return self._slots[name].state

    @asynccontextmanager
    async def using(self, name: str, again: bool = False) -> AsyncIterator[None]:
        """Hold a model in memory, which is loaded first where it is absent. `again`: even if it just failed.

        Raises:
            ModelsBusy: there is no room beside the models in use.
            EngineDown: it cannot be loaded.
        """
        slot = self._slots[name]
        slot.users += 1
        try:
            await self._wait_until_loaded(slot, again)
            yield
        finally:
            slot.users -= 1
            slot.used_at = next(self._uses)

    async def unload(self, name: str) -> None:
        """Unload a model. Raises ModelInUse while a request uses it, or waits for it."""
        slot = self._slots[name]
        if slot.users or slot.state == "loading":
            raise ModelInUse(f"the model {name!r} is in use by {slot.users} requests; unload it when they have ended")
        if slot.state == "loaded":
            self._start_unloading(slot)
        if slot.task is not None:
            await asyncio.wait({slot.task})

    async def stop(self) -> None:
        """Give up all loads. What is loaded stays."""
        tasks = {slot.task for slot in self._slots.values() if slot.task is not None and slot.state == "loading"}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _wait_until_loaded(self, slot: _Slot, again: bool) -> None:
        while slot.state != "loaded":
            if slot.state == "absent":
                self._start_loading(slot, again)
            task, loads = slot.task, slot.state == "loading"
            assert task is not None
            await asyncio.wait({task})  # a caller that leaves does not end it
            if loads and task.cancelled():
                raise EngineDown("the server is shutting down; try another one")
            if loads and slot.failure:
                raise _not_loaded(slot)

    def _start_loading(self, slot: _Slot, again: bool) -> None:
        if slot.failure and not again and time.monotonic() - slot.failed_at < AGAIN_SECONDS:
            raise _not_loaded(slot)
        self._make_room(slot)
        before = [other.task for other in self._slots.values() if other.task and other.state == "unloading"]
        slot.state, slot.failure = "loading", ""
        slot.task = asyncio.create_task(self._load(slot, before), name=f"load {slot.model.name}")

    def _make_room(self, slot: _Slot) -> None:
        """Begin to unload idle models, the one first that was used longest ago, until the model fits.

        Raises:
            ModelsBusy: it does not fit beside those that are not idle; nothing is unloaded.
        """
        if not self._limit:
            return
        missing = slot.model.bytes - self._limit + sum(one.model.bytes for one in self._slots.values() if one.claims)
        idle = [one for one in self._slots.values() if one.state == "loaded" and not one.users]
        chosen: list[_Slot] = []
        for other in sorted(idle, key=lambda one: one.used_at):
            if missing <= 0:
                break
            chosen.append(other)
            missing -= other.model.bytes
        if missing > 0:
            busy = ", ".join(one.model.name for one in self._slots.values() if one.claims and one not in chosen)
            raise ModelsBusy(
                f"the model {slot.model.name!r} needs {slot.model.bytes} of {self._limit} bytes (--models-memory), "
                f"{missing} more than there are beside the models in use: {busy}; try again later"
            )
        for other in chosen:
            self._start_unloading(other)

    async def _load(self, slot: _Slot, before: Sequence[asyncio.Task[None]]) -> None:
        began, name = time.monotonic(), slot.model.name
        try:
            if before:
                await asyncio.wait(before)
            await slot.model.load()
        except Exception as error:
            slot.state, slot.failed_at = "absent", time.monotonic()
            known = isinstance(error, MoedialError)
            slot.failure = str(error) if known else "internal error; the server's log has more"
            log.error("a model could not be loaded", model=name, reason=slot.failure, exc_info=None if known else error)
        except asyncio.CancelledError:
            slot.state = "absent"
            raise
        else:
            slot.state, slot.used_at = "loaded", next(self._uses)
            log.info("model loaded", model=name, seconds=round(time.monotonic() - began, 2))

    def _start_unloading(self, slot: _Slot) -> None:
        slot.state = "unloading"
        slot.task = asyncio.create_task(self._unload(slot), name=f"unload {slot.model.name}")

    async def _unload(self, slot: _Slot) -> None:
        try:
            await slot.model.unload()
        except Exception as error:
            log.error("a model could not be unloaded", model=slot.model.name, exc_info=error)
        finally:
            slot.state = "absent"
        log.info("model unloaded", model=slot.model.name)


def _not_loaded(slot: _Slot) -> EngineDown:
    return EngineDown(f"the model {slot.model.name!r} cannot be loaded: {slot.failure}")
