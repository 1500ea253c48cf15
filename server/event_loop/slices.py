"""Runs long work on the event loop in slices, between which other tasks run.

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
ENTRIES = 64  # of a long list that are serialised at a time


async def in_slices(steps: Steps[Result]) -> Result:
    """The result of all steps; other tasks run whenever a slice of time is over."""
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
    """The result of all steps, without a pause, where they are few."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result


class LongList:
    """A long list in an answer. Its entries are serialised in batches: bytes take a tenth of the memory, and the answer
    then only copies them."""

    def __init__(self) -> None:
        self._written: list[bytes] = []
        self._open: list[Any] = []

    def append(self, entry: Any) -> None:
        self._open.append(entry)

    def flush(self) -> None:
        """Serialise the entries since the last time."""
        if self._open:
            self._written.append(orjson.dumps(self._open)[1:-1])
            self._open = []

    @property
    def value(self) -> Any:
        """The list for `orjson.dumps`, as far as possible already serialised."""
        if not self._written:
            return self._open
        self.flush()
        return orjson.Fragment(b"[" + b",".join(self._written) + b"]")


def long_list(entries: Iterable[Any]) -> Steps[Any]:
    """The list of `entries` for `orjson.dumps`, made in steps."""
    made = LongList()
    for position, entry in enumerate(entries):
        if position and position % ENTRIES == 0:
            made.flush()
            yield
        made.append(entry)
    return made.value
