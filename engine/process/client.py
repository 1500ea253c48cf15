"""The engine client of the HTTP process: keeps an engine process alive and turns its messages into streams of events.

Whatever happens to the engine process, every running request ends: with its
last event, or with an exception.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Sequence

from engine.process.backoff import Backoff
from engine.process.child import Child, exit_description
from engine.process.engine_state import EngineState, engine_down
from engine.process.messages import (
    Abort,
    Busy,
    Compile,
    Failed,
    FrameError,
    FromEngine,
    Ping,
    Pong,
    Ready,
    Reports,
    SetCounts,
    Start,
    Stop,
    Submit,
)
from engine.process.silence import SilenceTimer, too_long
from engine.process.sinks import Sink, Sinks
from engine.types import EngineInfo, EngineSettings, Request, StepReport
from model.budget import ExpertCounts
from model.errors import EngineDown, EngineStopped, GenerationFailed, InvalidRequest, MoedialError

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "engine.process.worker")
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds before a restart of what did not serve well
FIRST_LOADS = 3  # so many processes may end during the first load before the model is given up


class EngineClient:
    """One engine process and the requests that run in it. Use from one event loop only.

    `on_report` gets every step's report before its events are delivered. `command` starts the child; the number of a
    file descriptor is appended to it. `failure` is why the last load failed, `restarts` counts new processes.

    A process that sends nothing for `hang_seconds` (0: no limit) and for 20 times the expected time of its step, or
    does not load within `load_timeout` seconds, is killed and replaced.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        on_report: Callable[[StepReport], None] | None = None,
        command: Sequence[str] = COMMAND,
        hang_seconds: float = 10.0,
        load_timeout: float = 600.0,
    ) -> None:
        self.settings, self.on_report = settings, on_report
        self.state: EngineState = "stopped"
        self.info: EngineInfo | None = None  # of the last process that loaded, kept while the next one does
        self.failure: str | None = None
        self.restarts = 0
        self._lost_loads = 0
        self._command, self._hang_seconds, self._load_timeout = tuple(command), hang_seconds, load_timeout
        self._silence = SilenceTimer(0.0)
        self._hung, self._answered = False, False  # of the process that runs
        self._child: Child | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._ready_at: float | None = None
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._sinks = Sinks()

    @property
    def pid(self) -> int | None:
        """The engine process, if there is one."""
        return self._child.pid if self._child else None

    @property
    def silence(self) -> float:
        """Seconds since the last message of the engine process; 0 if none serves."""
        return self._silence.since if self.state == "ready" else 0.0

    async def start(self) -> None:
        """Start loading and return at once; `ready` waits for it. A client starts only once."""
        if self._supervisor is not None:
            raise RuntimeError("an engine client starts only once")
        self._change("loading")
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def ready(self, timeout: float | None = None) -> EngineInfo:
        """Wait until requests can be served.

        Raises:
            EngineDown: the engine is not ready after `timeout` seconds, or never will be.
        """
        try:
            async with asyncio.timeout(timeout):
                while self.state in ("loading", "restarting"):
                    await self._changed.wait()
        except TimeoutError:
            raise EngineDown(f"the engine was not ready within {timeout} seconds") from None
        if self.state != "ready" or self.info is None:
            raise engine_down(self.state, self.failure)
        return self.info

    def submit(self, request: Request, sink: Sink) -> None:
        """Run a request. `sink` gets its events, one or more at a time, the last one with `finish`, or the error that
        ends it. It is called on the event loop, so it must be quick and must not raise.

        Raises:
            EngineDown: the engine takes no work now.
            InvalidRequest: it can never be served, or its id is taken.
        """
        self._ask(request.id, Submit((request,)), sink)

    def compile(self, id: str, grammar: str, sink: Sink) -> None:
        """Compile a grammar before a request that has it. `sink` gets no events when that is done, or an error; `id` is
        like a request's. Raises as `submit`."""
        self._ask(id, Compile(id, grammar), sink)

    def _ask(self, id: str, message: Submit | Compile, sink: Sink) -> None:
        if self.state != "ready" or self._child is None:
            raise engine_down(self.state, self.failure)
        if id in self._sinks:
            raise InvalidRequest(f"a request with id {id!r:.64} is already running", "id", "duplicate_id")
        try:
            self._child.send(message)
        except FrameError as error:
            raise InvalidRequest(f"the request is too large: {error}") from error
        self._sinks[id] = sink

    def abort(self, request_id: str) -> None:
        """End a request whose reader has left; its sink is not called again. An unknown id is ignored."""
        if self._sinks.get(request_id) is None:
            return
        self._sinks[request_id] = None
        if self._child is not None:
            self._child.send(Abort((request_id,)))

    def set_counts(self, request_id: str, counts: ExpertCounts) -> None:
        """Give the tokens of a running request that are still to be computed these counts. An unknown id is ignored.

        Raises:
            InvalidRequest: the model cannot run them.
        """
        if self.info is not None:
            self.info.experts.budget(counts)
        if self._child is not None and self._sinks.get(request_id) is not None:
            self._child.send(SetCounts(request_id, counts))

    async def stop(self, timeout: float = 10.0) -> None:
        """Take no more requests, let the running ones end for up to `timeout` seconds, then kill the process.

        A second call does not wait: it kills.
        """
        serving = self.state == "ready"
        self._stopping.set()
        self._change("stopped")
        if self._supervisor is None:
            return
        if self._child is not None:
            if serving:
                self._child.send(Stop())
            else:
                self._child.kill()
        await asyncio.wait({self._supervisor}, timeout=timeout)
        if self._child is not None:
            self._child.kill()
        await asyncio.wait({self._supervisor})

    async def _supervise(self) -> None:
        """Run one process after the other, until told to stop or a load fails for good."""
        backoff = Backoff(FIRST_DELAY, LONGEST_DELAY)
        try:
            while not self._stopping.is_set():
                served = await self._run_child()
                if self.state in ("failed", "stopped"):
                    return
                delay = backoff.delay(self._answered or served >= LONGEST_DELAY)
                log.error("the engine process ended; the next one starts in %.1f s", delay)
                if not await self._stopped_within(delay):
                    self.restarts += 1
        except Exception:
            log.exception("the engine supervisor failed")
            self._lose("failed")

    async def _run_child(self) -> float:
        """One process from start to end; returns for how many seconds it could serve."""
        self._ready_at, self._hung, self._answered = None, False, False
        try:
            child = await Child.spawn(self._command)
        except OSError:
            log.exception("the engine process could not be started")
            self._lose("restarting")
            return 0.0
        self._child, self._silence = child, SilenceTimer(self._load_timeout, asks=False)
        watch = asyncio.create_task(self._watch(child), name="engine watch")
        try:
            child.send(Start(self.settings))
            if self._stopping.is_set():
                child.kill()
            async for message in child.messages():
                self._receive(message)
        except FrameError as error:
            log.error("the engine process sent an invalid message: %s", error)
        finally:
            watch.cancel()
            served = 0.0 if self._ready_at is None else time.monotonic() - self._ready_at
            # A model that loaded once can load again: only a first load can fail for good.
            self._lose("failed" if self.failure is not None and self.info is None else "restarting")
            status = await child.close()
            log.info("engine process %d ended %s", child.pid, exit_description(status))
            self._child = None
            self._count_lost_load(status)
        return served

    async def _watch(self, child: Child) -> None:
        """Ping a silent process, and kill one that hangs."""
        silence = await too_long(lambda: self._silence, lambda: child.send(Ping()))
        doing = f"with {len(self._sinks)} requests" if self._ready_at else "while it loads the model"
        log.error("engine process %d said nothing for %.1f s %s; it is killed", child.pid, silence.since, doing)
        self._hung = True
        await child.dump()
        child.kill_and_close()

    def _count_lost_load(self, status: int) -> None:
        """Give up a model whose first load has ended the process several times."""
        if self.info is not None or self.state in ("failed", "stopped"):
            return
        self._lost_loads += 1
        if self._lost_loads == FIRST_LOADS:
            how = f"{FIRST_LOADS} times in a row while loading, the last time {exit_description(status)}"
            self.failure = f"the engine process ended {how}"
            self._lose("failed")

    def _receive(self, message: FromEngine) -> None:
        self._silence.reset(message.seconds if isinstance(message, Busy) else 0.0)
        match message:
            case Ready(info):
                self.info, self.failure, self._ready_at = info, None, time.monotonic()
                self._silence = SilenceTimer(self._hang_seconds)
                self._change("ready")
            case Failed(reason):
                self.failure = reason
            case Reports(reports):
                for report in reports:
                    self._observe(report)
                self._answered = self._sinks.distribute(reports, time.monotonic()) or self._answered
            case Pong() | Busy():
                pass
            case _:
                self._answered = self._sinks.receive(message, time.monotonic()) or self._answered

    def _observe(self, report: StepReport) -> None:
        if self.on_report is None:
            return
        try:
            self.on_report(report)
        except Exception:
            log.exception("on_report failed")  # statistics must not stop answers

    def _lose(self, state: EngineState) -> None:
        """Enter a state without an engine process: every running request ends with an error."""
        self._change(state)
        kind: type[MoedialError] = GenerationFailed
        why = "the engine process hung and was ended" if self._hung else "the engine process ended"
        if self.state == "stopped":
            kind, why = EngineStopped, "the server was stopped"
        self._sinks.fail(lambda: kind(f"{why} while the request was running"))

    def _change(self, state: EngineState) -> None:
        self.state = "stopped" if self._stopping.is_set() else state
        self._changed.set()
        self._changed = asyncio.Event()

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._stopping.wait()
        except TimeoutError:
            return False
