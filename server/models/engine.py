"""An engine that can be started again after it was stopped, as its model is loaded and unloaded."""

from collections.abc import Callable, Sequence

from engine.types import EngineInfo, Request, StepReport, TimedEvent
from model.budget import ExpertCounts
from model.errors import EngineDown, MoedialError
from server.protocols import EngineProtocol, EngineState

Sink = Callable[[Sequence[TimedEvent] | MoedialError], None]


class ReloadableEngine:
    """Each start makes a new engine with `make`; between two it is stopped and takes nothing.

    `restarts` counts engine processes after the first, `reloads` those among them that followed an unload.
    """

    def __init__(self, make: Callable[[], EngineProtocol]) -> None:
        self.on_report: Callable[[StepReport], None] | None = None
        self.reloads = 0
        self._make = make
        self._engine: EngineProtocol | None = None
        self._earlier = 0  # restarts before the engine of now

    @property
    def restarts(self) -> int:
        return self._earlier + (self._engine.restarts if self._engine is not None else 0)

    @property
    def pid(self) -> int | None:
        return self._engine.pid if self._engine is not None else None

    @property
    def silence(self) -> float:
        return self._engine.silence if self._engine is not None else 0.0

    @property
    def info(self) -> EngineInfo | None:
        return self._engine.info if self._engine is not None else None

    @property
    def state(self) -> EngineState:
        return self._engine.state if self._engine is not None else "stopped"

    async def start(self) -> None:
        """Start a new engine; the one before has been stopped."""
        if self._engine is not None:
            self._earlier = self.restarts + 1
            self.reloads += 1
        self._engine = self._make()
        self._engine.on_report = self.on_report
        await self._engine.start()

    async def ready(self, timeout: float) -> EngineInfo:
        return await self._running().ready(timeout)

    async def stop(self, timeout: float) -> None:
        if self._engine is not None:
            await self._engine.stop(timeout)

    def submit(self, request: Request, sink: Sink) -> None:
        self._running().submit(request, sink)

    def compile(self, id: str, grammar: str, sink: Sink) -> None:
        self._running().compile(id, grammar, sink)

    def abort(self, request_id: str) -> None:
        if self._engine is not None:
            self._engine.abort(request_id)

    def set_counts(self, request_id: str, counts: ExpertCounts) -> None:
        if self._engine is not None:
            self._engine.set_counts(request_id, counts)

    def _running(self) -> EngineProtocol:
        if self._engine is None:
            raise EngineDown("the model is not loaded")
        return self._engine
