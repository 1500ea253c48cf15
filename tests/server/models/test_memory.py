"""Which models are in memory: never more than the limit, none that is in use is unloaded, and every request ends."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import CheckpointError, EngineDown
from server.errors import ModelInUse, ModelsBusy
from server.models import memory
from server.models.memory import ModelMemory

SIZES = {"a": 4, "b": 3, "c": 6}
LIMIT = 9
TIMEOUT = 20.0


class Resident:
    """What all models of a test have in memory, and who uses them."""

    def __init__(self) -> None:
        self.bytes, self.most, self.users = 0, 0, Counter[str]()
        self.events: list[str] = []
        self.torn = False  # whether a model was unloaded while it was in use


class FakeModel:
    """A model whose load and unload take some turns of the event loop."""

    def __init__(self, name: str, resident: Resident, turns: int = 1, faults: int = 0) -> None:
        self.name, self.bytes = name, SIZES[name]
        self.turns, self.faults, self.resident = turns, faults, resident

    async def load(self) -> None:
        self._take(self.bytes)
        try:
            await turns(self.turns)
            if self.faults:
                self.faults -= 1
                raise CheckpointError("a fault")
        except BaseException:
            self._take(-self.bytes)
            raise
        self.resident.events.append(f"+{self.name}")

    async def unload(self) -> None:
        self.resident.torn |= self.resident.users[self.name] > 0
        await turns(self.turns)
        self._take(-self.bytes)
        self.resident.events.append(f"-{self.name}")

    def _take(self, count: int) -> None:
        self.resident.bytes += count
        self.resident.most = max(self.resident.most, self.resident.bytes)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def of(limit: int = LIMIT, **faults: int) -> tuple[ModelMemory, Resident]:
    resident = Resident()
    return ModelMemory([FakeModel(name, resident, faults=faults.get(name, 0)) for name in SIZES], limit), resident


async def use(models: ModelMemory, name: str) -> None:
    async with models.using(name):
        pass


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work, TIMEOUT)

    asyncio.run(bounded())


def test_the_model_that_was_used_longest_ago_makes_room() -> None:
    async def work() -> None:
        models, resident = of()
        for name in ("a", "b", "a", "c"):
            await use(models, name)
        assert resident.events == ["+a", "+b", "-b", "-a", "+c"]
        assert [models.state(name) for name in SIZES] == ["absent", "absent", "loaded"]
        await use(models, "b")
        assert resident.events[5:] == ["+b"] and resident.most == LIMIT  # it fits beside c

    run(work())


def test_without_a_limit_nothing_is_unloaded() -> None:
    async def work() -> None:
        models, resident = of(limit=0)
        for name in "abcab":
            await use(models, name)
        assert resident.events == ["+a", "+b", "+c"]

    run(work())


def test_a_model_in_use_is_not_unloaded_and_the_refusal_names_it_with_the_sizes() -> None:
    async def work() -> None:
        models, resident = of()
        async with models.using("a"):
            await use(models, "b")
            with pytest.raises(ModelsBusy, match=r"'c' needs 6 of 9 bytes.*1 more than .*in use: a;"):
                await use(models, "c")
            assert resident.events == ["+a", "+b"]  # b stays: without it there would be too little as well
            with pytest.raises(ModelInUse):
                await models.unload("a")
        await models.unload("a")
        await models.unload("a")
        await use(models, "c")
        assert resident.events == ["+a", "+b", "-a", "+c"]

    run(work())


def test_requests_for_one_model_share_its_load_and_one_that_leaves_does_not_end_it() -> None:
    async def work() -> None:
        models, resident = of()
        leaving = asyncio.create_task(use(models, "a"))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(*(use(models, "a") for _ in range(3)))
        assert leaving.cancelled() and resident.events == ["+a"]

    run(work())


def test_a_load_that_fails_is_tried_again_after_a_while_or_when_the_operator_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        models, resident = of(a=2)
        for _ in range(2):
            with pytest.raises(EngineDown, match="'a' cannot be loaded: a fault"):
                await use(models, "a")
        assert models._slots["a"].model.faults == 1  # type: ignore[attr-defined]  # the second one was not tried
        with pytest.raises(EngineDown):
            async with models.using("a", again=True):
                pass
        monkeypatch.setattr(memory, "AGAIN_SECONDS", 0.0)
        await use(models, "a")
        assert resident.events == ["+a"] and resident.bytes == SIZES["a"]

    run(work())


def test_stopping_gives_up_loads() -> None:
    async def work() -> None:
        models, resident = of()
        waiting = asyncio.create_task(use(models, "a"))
        await turns(1)
        await models.stop()
        with pytest.raises(EngineDown, match="shutting down"):
            await waiting
        assert resident.bytes == 0

    run(work())


Client = tuple[str, int, int, bool]  # model, turns before, turns held, whether it gives up

clients = st.lists(
    st.tuples(st.sampled_from(list(SIZES)), st.integers(0, 40), st.integers(0, 6), st.booleans()),
    min_size=4,
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(clients, st.integers(6, 13), st.lists(st.integers(1, 4), min_size=3, max_size=3), st.integers(0, 1))
def test_whatever_clients_do_the_limit_holds_and_all_of_them_end(
    clients: Sequence[Client], limit: int, load_turns: Sequence[int], faults: int
) -> None:
    resident = Resident()
    fakes = [FakeModel(name, resident, wait, faults) for name, wait in zip(SIZES, load_turns, strict=True)]
    models = ModelMemory(fakes, limit)

    async def client(name: str, before: int, held: int, _: bool) -> None:
        await turns(before)
        with contextlib.suppress(ModelsBusy, EngineDown):
            async with models.using(name, again=bool(held % 2)):
                resident.users[name] += 1
                try:
                    assert models.state(name) == "loaded"
                    await turns(held)
                finally:
                    resident.users[name] -= 1

    async def operator() -> None:
        for name in SIZES:
            await turns(15)
            with contextlib.suppress(ModelInUse):
                await models.unload(name)

    async def work() -> None:
        tasks = [asyncio.create_task(client(*one)) for one in clients]
        leaving = [task for task, one in zip(tasks, clients, strict=True) if one[3]]
        unloading = asyncio.create_task(operator())
        for task in leaving:
            await turns(4)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await unloading
        assert [error for error in results if error and not isinstance(error, asyncio.CancelledError)] == []
        while any(models.state(name) in ("loading", "unloading") for name in SIZES):
            await asyncio.sleep(0)
        assert resident.bytes == sum(SIZES[name] for name in SIZES if models.state(name) == "loaded")

    run(work())
    assert resident.most <= limit and not resident.torn
