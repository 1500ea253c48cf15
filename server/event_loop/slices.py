"""Long work on the event loop in slices, between which others get their turns. It knows no work.

Such work is a generator that yields wherever it may pause, and returns its result.
"""

import asyncio
import time
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

import orjson

Result = TypeVar("Result")
Steps = Generator[None, None, Result]
SLICE = 0.002  # seconds
ENTRIES = 64  # of a long list, that are made and written at a time


async def in_slices(steps: Steps[Result]) -> Result:
    """The result of all steps; others run whenever a slice of time is over."""
    due = time.perf_counter() + SLICE
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
        if time.perf_counter() >= due:
            await asyncio.sleep(0)
            due = time.perf_counter() + SLICE


def at_once(steps: Steps[Result]) -> Result:
    """The result of all steps, where they are few."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result


class LongList:
    """A list of an answer. What is in it is written every so often: bytes take a tenth of the memory, and the whole
    answer is then written by copying."""

    def __init__(self) -> None:
        self._written: list[bytes] = []
        self._open: list[Any] = []

    def append(self, entry: Any) -> None:
        self._open.append(entry)

    def flush(self) -> None:
        if self._open:
            self._written.append(orjson.dumps(self._open)[1:-1])
            self._open = []

    @property
    def value(self) -> Any:
        """For `orjson.dumps`: the list, or what is written of it."""
        if not self._written:
            return self._open
        self.flush()
        return orjson.Fragment(b"[" + b",".join(self._written) + b"]")


def long_list(entries: Iterable[Any]) -> Steps[Any]:
    found = LongList()
    for place, entry in enumerate(entries):
        if place and place % ENTRIES == 0:
            found.flush()
            yield
        found.append(entry)
    return found.value
