"""Runs the sequences of one generation call (one HTTP request) side by side and passes on their deltas as they arrive.

Every sequence ends exactly once; closing early aborts what still runs.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from engine.types import NO_TOKEN_LEFT, Request, TimedEvent, TokenEvent
from model.budget import ExpertBudget
from model.errors import GenerationFailed, InvalidRequest, MoedialError
from server.errors import GenerationTimeout
from server.generation.admission import Reservation
from server.generation.compiling import GrammarCheckQueue
from server.generation.output_processor import Delta, OutputProcessor
from server.generation.timeline import Timeline
from server.protocols import EngineProtocol, ExpertChoiceProtocol

log = structlog.get_logger("server")


@dataclass(frozen=True, slots=True)
class AnswerSequence:
    """One answer to one prompt: its request to the engine, its output and its timeline.

    `again`, with a cascade: makes a new sequence for the second run of this answer.
    """

    request: Request
    output: OutputProcessor
    timeline: Timeline
    again: "Callable[[], AnswerSequence] | None" = None


Pass = dict[int, AnswerSequence]  # the sequences of one pass (one budget), by position of the answer


@dataclass(frozen=True, slots=True)
class Timeouts:
    """In seconds: until a generation call's first slot in the batch, and from its start to its end."""

    queue: float
    total: float


class Generation:
    """The running sequences of one generation call.

    The path of a token is short, since at thousands of tokens per second each task and timer on it is expensive: the
    engine client calls a sink, which passes deltas to `write_direct`, or else to the one reader that waits in `next`.

    `write_direct` may be set to take deltas in place of a waiting reader; it returns False where it cannot take them
    now. It never gets the last delta of a sequence.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        reservation: Reservation,
        sequences: tuple[AnswerSequence, ...],
        timeouts: Timeouts,
        compiler: GrammarCheckQueue,
        choice: ExpertChoiceProtocol,
        grammar_field: str = "",
    ) -> None:
        self.sequences = list(sequences)  # one per answer; the second run of an answer replaces its first
        self.passes: tuple[Pass, Pass] = dict(enumerate(sequences)), {}  # first runs, and second runs of a cascade
        self._grammar_field, self._compiler = grammar_field, compiler
        self._engine, self._reservation, self._timeouts = engine, reservation, timeouts
        self._choice = choice
        self._adapting: asyncio.Task[None] | None = None  # decides again what the sequences may use
        self.write_direct: Callable[[list[Delta]], bool] | None = None
        self._deltas: deque[Delta | MoedialError] = deque()  # at most as many as the answers have tokens
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Future[None] | None = None  # waits for a delta
        self._timer: asyncio.TimerHandle | None = None  # of the reader's timeout
        self._timeout, self._due = 0.0, 0.0
        self._unfinished = len(sequences)
        self._tasks: list[asyncio.Task[None]] = []
        self._compiling: asyncio.Task[None] | None = None  # of the grammar, which all sequences share

    def start(self) -> None:
        """Start all sequences; each waits for the grammar, then for a slot."""
        deadline = self._loop.time() + self._timeouts.total
        first = self.sequences[0].request
        if grammar := first.sampling.grammar:
            compiled = self._compiler.compile(f"{first.id}-grammar", grammar, self._timeouts.queue)
            self._compiling = asyncio.create_task(compiled)
        self._tasks = [asyncio.create_task(self._run(position, deadline)) for position in range(len(self.sequences))]

    @property
    def finished(self) -> bool:
        return self._unfinished == 0

    @property
    def runs(self) -> list[AnswerSequence]:
        """All sequences that run or have run, those of answers that were made again too."""
        return [sequence for one in self.passes for sequence in one.values()]

    async def next(self, timeout: float | None = None) -> list[Delta]:
        """The deltas that have arrived since the last call; none when nothing arrived for `timeout` seconds.

        Raises:
            MoedialError: what ended a sequence, once the deltas before it have been returned.
        """
        if not self._deltas:
            await self._wait(timeout)
        found: list[Delta] = []
        while self._deltas and isinstance(self._deltas[0], Delta):
            found.append(self._deltas[0])
            self._deltas.popleft()
        if not found and self._deltas:
            error = self._deltas.popleft()
            assert isinstance(error, MoedialError)
            raise error
        self._unfinished -= sum(delta.finish is not None for delta in found)
        return found

    async def close(self) -> None:
        """Abort what still runs and release the reservation, before the first await."""
        self.write_direct = None
        tasks = [*self._tasks, *(task for task in (self._compiling, self._adapting) if task)]
        for task in tasks:
            task.cancel()
        for sequence in self.runs:
            sequence.timeline.abort()
        self._reservation.release()
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _wait(self, timeout: float | None) -> None:
        reader = self._reader = self._loop.create_future()
        if timeout is not None:
            self._timeout, self._due = timeout, self._loop.time() + timeout
            self._timer = self._timer or self._loop.call_at(self._due, self._tick)
        try:
            await reader
        finally:
            self._reader = None

    def _tick(self) -> None:
        """One timer serves all waits. It is started for the first wait, and restarted if a later wait ends later."""
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
        """Pass on deltas. A reader that waits has taken all earlier deltas, so writing directly keeps their order."""
        waiting = self._reader is not None and not self._reader.done()
        can_write = waiting and self.write_direct is not None and deltas[-1].finish is None
        if can_write and self._written(deltas):
            self._due = self._loop.time() + self._timeout
        else:
            self._deltas += deltas
            self._wake()

    def _written(self, deltas: list[Delta]) -> bool:
        """Whether `write_direct` took the deltas. An exception in it ends this answer, and does not reach the engine
        client."""
        assert self.write_direct is not None
        try:
            return self.write_direct(deltas)
        except Exception as error:
            log.error("internal error", exc_info=error)
            self._deltas.append(GenerationFailed("internal error"))
            self._wake()
            return True

    async def _run(self, position: int, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                if self._compiling is not None:
                    await asyncio.shield(self._compiling)
                async with self._reservation.slot(self._timeouts.queue):
                    await self._answer(position)
            return
        except TimeoutError:
            error: MoedialError = GenerationTimeout(f"not finished within {self._timeouts.total:g} s")
        except InvalidRequest as raised:
            error = raised
            if raised.param == "grammar":  # the engine does not know the name that the client used
                error = InvalidRequest(raised.message, self._grammar_field, raised.code)
        except MoedialError as raised:
            error = raised
        except Exception as raised:
            log.error("internal error", exc_info=raised)
            error = GenerationFailed("internal error")
        self.sequences[position].timeline.fail(error)
        self._deltas.append(error)
        self._wake()

    async def _answer(self, position: int) -> None:
        """Make one answer. With a cascade its deltas are held until it is known whether it is made again."""
        sequence, cascade = self.sequences[position], self._choice.cascade
        sequence.timeline.started = time.monotonic()
        budget = self._choice.begin()
        sequence.timeline.set_budget(budget)
        if self._choice.interval is not None and self._adapting is None:
            self._adapting = asyncio.create_task(self._adapt(self._choice.interval))
        if cascade is None or sequence.again is None:
            await self._generate(sequence, budget, self._put)
            return
        held: list[Delta] = []
        await self._generate(sequence, budget, held.extend)
        if not cascade.unsure(sequence.output.mean_measured):
            self._put(held)
            return
        second = self.sequences[position] = self.passes[1][position] = sequence.again()
        second.timeline.started = sequence.timeline.started
        await self._generate(second, cascade.high, self._put)

    async def _generate(
        self, sequence: AnswerSequence, budget: ExpertBudget, put: Callable[[list[Delta]], None]
    ) -> None:
        """Run the sequence until it has ended here, then abort what the engine still does for it."""
        ended: asyncio.Future[None] = self._loop.create_future()

        def on_arrivals(found: Sequence[TimedEvent] | MoedialError) -> None:
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
            put(deltas)

        self._engine.submit(replace(sequence.request, budget=budget), on_arrivals)
        try:
            await ended
        finally:
            self._engine.abort(sequence.request.id)

    async def _adapt(self, interval: float) -> None:
        """Until it is cancelled, choose again every `interval` seconds, and give running sequences the new counts."""
        while True:
            await asyncio.sleep(interval)
            budget = self._choice.again()
            if budget is None:
                continue
            for sequence in self.sequences:
                if sequence.timeline.started is not None and sequence.timeline.outcome is None:
                    sequence.timeline.change_budget(budget)
                    self._engine.set_counts(sequence.request.id, budget.per_layer)


def _advance(sequence: AnswerSequence, arrivals: Sequence[TimedEvent], deltas: list[Delta]) -> None:
    """Append the deltas of the arrived events to `deltas`: those before a failure are kept."""
    timeline, output = sequence.timeline, sequence.output
    for event, at in arrivals:
        if event.finish in ("error", "abort"):
            raise _failure(event)
        if event.token is not None:
            timeline.record_token(at)
        if event.stats is not None:
            timeline.record_stats(event.stats)
        delta = output.push(event)
        if not delta.empty:
            deltas.append(delta)
        if delta.finish is not None:
            timeline.succeed(delta.finish)
            return


def _failure(event: TokenEvent) -> MoedialError:
    """Why the engine ended a sequence. Errors with a code are about its grammar, or about several fields together."""
    message = event.error or "the engine gave this request up"
    field = None if event.code == NO_TOKEN_LEFT else "grammar"
    return InvalidRequest(message, field, event.code) if event.code else GenerationFailed(message)
