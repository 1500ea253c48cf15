"""Runs the sequences of one call side by side and hands out their deltas in order of arrival.

Every sequence ends once; leaving early aborts what still runs. It knows neither HTTP nor JSON.
"""

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from engine.types import Request, TokenEvent
from model.errors import GenerationFailed, InvalidRequest, MoedialError
from server.admission import Admission, Reservation
from server.errors import GenerationTimeout
from server.lifecycle import Lifecycle
from server.seams import Engine
from server.transcript import Delta, Transcript

log = structlog.get_logger("server")
AHEAD = 32  # deltas a slow reader may leave unread, per sequence, before its sequence waits


@dataclass(frozen=True, slots=True)
class Sequence:
    request: Request
    transcript: Transcript
    life: Lifecycle


@dataclass(frozen=True, slots=True)
class Timeouts:
    """In seconds: for a place in the batch, and from the call's start to its end."""

    queue: float
    total: float


class Generation:
    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        reservation: Reservation,
        sequences: tuple[Sequence, ...],
        timeouts: Timeouts,
        grammar_field: str = "",
    ) -> None:
        self.sequences, self._grammar_field = sequences, grammar_field
        self._engine, self._admission, self._reservation, self._timeouts = engine, admission, reservation, timeouts
        self._deltas: asyncio.Queue[Delta | MoedialError] = asyncio.Queue(AHEAD * len(sequences))
        self._open = len(sequences)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._timeouts.total
        self._tasks = [asyncio.create_task(self._run(sequence, deadline)) for sequence in self.sequences]

    @property
    def finished(self) -> bool:
        return self._open == 0

    async def next(self, patience: float | None = None) -> Delta | None:
        """The next delta, or None when nothing came for `patience` seconds. Raises what ended a sequence."""
        try:
            async with asyncio.timeout(patience):
                item = await self._deltas.get()
        except TimeoutError:
            return None
        if isinstance(item, MoedialError):
            raise item
        self._open -= item.finish is not None
        return item

    async def close(self) -> None:
        """Abort what still runs and give the slots back. What must happen does so before the first await."""
        for task in self._tasks:
            task.cancel()
        for sequence in self.sequences:
            sequence.life.abort()
        self._reservation.release()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, sequence: Sequence, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline), self._admission.turn(self._timeouts.queue):
                await self._pump(sequence)
            return
        except TimeoutError:
            error: MoedialError = GenerationTimeout(f"not finished within {self._timeouts.total:g} s")
        except InvalidRequest as raised:
            error = raised
            if raised.param == "grammar":  # the engine does not know what the caller calls it
                error = InvalidRequest(raised.message, self._grammar_field, raised.code)
        except MoedialError as raised:
            error = raised
        except Exception as raised:
            log.error("internal error", exc_info=raised)
            error = GenerationFailed("internal error")
        sequence.life.fail(error)
        await self._deltas.put(error)

    async def _pump(self, sequence: Sequence) -> None:
        sequence.life.started = time.monotonic()
        # closing the generator is what aborts the request in the engine; leaving the loop alone would not
        async with aclosing(self._engine.generate(sequence.request)) as events:
            async for event in events:
                delta = _advance(sequence, event)
                if not delta.empty:
                    await self._deltas.put(delta)
                if delta.finish:
                    return
        raise GenerationFailed("the engine ended this request without a reason")


def _advance(sequence: Sequence, event: TokenEvent) -> Delta:
    if event.finish in ("error", "abort"):
        raise GenerationFailed(event.error or "the engine gave this request up")
    life = sequence.life
    if event.token is not None:
        life.token()
    delta = sequence.transcript.push(event)
    if delta.finish is not None:
        life.stats = event.stats
        life.succeed(delta.finish)
    return delta
