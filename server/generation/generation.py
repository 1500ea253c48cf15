"""Runs the sequences of one call side by side and hands out their deltas in order of arrival.

Every sequence ends once; leaving early aborts what still runs. It knows neither HTTP nor JSON.
"""

import asyncio
import time
from collections import abc, deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from engine.types import NO_TOKEN_LEFT, Request, TimedEvent, TokenEvent
from model.errors import GenerationFailed, InvalidRequest, MoedialError
from server.errors import GenerationTimeout
from server.generation.admission import Reservation
from server.generation.compiling import Compiler
from server.generation.output_processor import Delta, Transcript
from server.generation.timeline import Lifecycle
from server.protocols import Engine

log = structlog.get_logger("server")


@dataclass(frozen=True, slots=True)
class Sequence:
    request: Request
    transcript: Transcript
    life: Lifecycle


@dataclass(frozen=True, slots=True)
class Timeouts:
    """In seconds: for a call's first place in the batch, and from its start to its end."""

    queue: float
    total: float


class Generation:
    """A token's way is short, for at thousands of tokens per second every task that it wakes and every timer is dear:
    the engine calls a sink, and the sink hands the deltas to `direct`, where somebody writes them on the spot, or else
    to the one reader that waits in `next`.

    `direct` takes deltas in place of a waiting reader; false: not now. It never gets a sequence's last delta.
    """

    def __init__(
        self,
        engine: Engine,
        reservation: Reservation,
        sequences: tuple[Sequence, ...],
        timeouts: Timeouts,
        compiler: Compiler,
        grammar_field: str = "",
    ) -> None:
        self.sequences, self._grammar_field, self._compiler = sequences, grammar_field, compiler
        self._engine, self._reservation, self._timeouts = engine, reservation, timeouts
        self.direct: Callable[[list[Delta]], bool] | None = None
        self._deltas: deque[Delta | MoedialError] = deque()  # as many as the answers have tokens, at the most
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Future[None] | None = None  # waits for a delta
        self._timer: asyncio.TimerHandle | None = None  # of a reader's patience, which ends when it is due
        self._patience, self._due = 0.0, 0.0
        self._open = len(sequences)
        self._tasks: list[asyncio.Task[None]] = []
        self._compiling: asyncio.Task[None] | None = None  # of the grammar that all sequences have

    def start(self) -> None:
        deadline = self._loop.time() + self._timeouts.total
        first = self.sequences[0].request
        if grammar := first.sampling.grammar:
            compiled = self._compiler.compile(f"{first.id}-grammar", grammar, self._timeouts.queue)
            self._compiling = asyncio.create_task(compiled)
        self._tasks = [asyncio.create_task(self._run(sequence, deadline)) for sequence in self.sequences]

    @property
    def finished(self) -> bool:
        return self._open == 0

    async def next(self, patience: float | None = None) -> list[Delta]:
        """The deltas that have come since, or none when nothing came for `patience` seconds. Raises what ended a
        sequence, after the deltas that came before it."""
        if not self._deltas:
            await self._wait(patience)
        found: list[Delta] = []
        while self._deltas and isinstance(self._deltas[0], Delta):
            found.append(self._deltas[0])
            self._deltas.popleft()
        if not found and self._deltas:
            error = self._deltas.popleft()
            assert isinstance(error, MoedialError)
            raise error
        self._open -= sum(delta.finish is not None for delta in found)
        return found

    async def close(self) -> None:
        """Abort what still runs and give the slots back. What must happen does so before the first await."""
        self.direct = None
        tasks = [*self._tasks, *([self._compiling] if self._compiling else [])]
        for task in tasks:
            task.cancel()
        for sequence in self.sequences:
            sequence.life.abort()
        self._reservation.release()
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _wait(self, patience: float | None) -> None:
        reader = self._reader = self._loop.create_future()
        if patience is not None:
            self._patience, self._due = patience, self._loop.time() + patience
            self._timer = self._timer or self._loop.call_at(self._due, self._tick)
        try:
            await reader
        finally:
            self._reader = None

    def _tick(self) -> None:
        """One timer serves all waits: it goes off for the first and is set anew for the last."""
        self._timer = None
        if self._reader is None:
            return
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._tick)
        else:
            self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _put(self, deltas: list[Delta]) -> None:
        """Whatever is written directly comes after all that the reader took, as it waits for more."""
        waiting = self._reader is not None and not self._reader.done()
        if waiting and self.direct is not None and deltas[-1].finish is None and self._written(self.direct, deltas):
            self._due = self._loop.time() + self._patience
        else:
            self._deltas += deltas
            self._wake()

    def _written(self, direct: Callable[[list[Delta]], bool], deltas: list[Delta]) -> bool:
        """A fault in writing ends this answer, as it would in the reader, and not who brought the deltas."""
        try:
            return direct(deltas)
        except Exception as error:
            log.error("internal error", exc_info=error)
            self._deltas.append(GenerationFailed("internal error"))
            self._wake()
            return True

    async def _run(self, sequence: Sequence, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                if self._compiling is not None:
                    await asyncio.shield(self._compiling)
                async with self._reservation.turn(self._timeouts.queue):
                    await self._generate(sequence)
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
        self._deltas.append(error)
        self._wake()

    async def _generate(self, sequence: Sequence) -> None:
        """Until the sequence has ended here; whatever the engine still does of it is aborted."""
        sequence.life.started = time.monotonic()
        ended: asyncio.Future[None] = self._loop.create_future()

        def take(found: abc.Sequence[TimedEvent] | MoedialError) -> None:
            if ended.done():
                return
            deltas: list[Delta] = []
            try:
                if isinstance(found, Exception):
                    raise found
                _advance(sequence, found, deltas)
            except Exception as error:
                ended.set_exception(error)
            if not deltas:
                return
            if deltas[-1].finish and not ended.done():
                ended.set_result(None)
            self._put(deltas)

        self._engine.submit(sequence.request, take)
        try:
            await ended
        finally:
            self._engine.abort(sequence.request.id)


def _advance(sequence: Sequence, arrivals: abc.Sequence[TimedEvent], deltas: list[Delta]) -> None:
    """Add what is to be shown to `deltas`, so that what came before a failure is not lost with it."""
    life, transcript = sequence.life, sequence.transcript
    for event, at in arrivals:
        if event.finish in ("error", "abort"):
            raise _failure(event)
        if event.token is not None:
            life.token(at)
        if event.stats is not None:
            life.tell(event.stats)
        delta = transcript.push(event)
        if not delta.empty:
            deltas.append(delta)
        if delta.finish is not None:
            life.succeed(delta.finish)
            return


def _failure(event: TokenEvent) -> MoedialError:
    """Why the engine ended a sequence. With a code, it is its grammar that is at fault, or several fields together."""
    message = event.error or "the engine gave this request up"
    field = None if event.code == NO_TOKEN_LEFT else "grammar"
    return InvalidRequest(message, field, event.code) if event.code else GenerationFailed(message)
