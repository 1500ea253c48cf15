"""A fake device that computes nothing before the host waits for it, and then all that was launched, in order.

So whatever the host reads early it reads wrongly: a token before it is sampled, or a block that the device has not
written yet.
"""

import sys
import time
from collections import deque

from engine.engine import Engine
from engine.plan import Plan, StepResult
from engine.process.worker import main
from engine.sequence import LATE
from engine.types import EngineInfo, EngineSettings
from model.errors import EngineDown
from tests.engine.fake import STEP_SECONDS, FakeRunner, blocks_of, build_fake, token_of


class Launch:
    """A plan as the device got it: what the host changes afterwards changes nothing."""

    def __init__(self, plan: Plan, sources: list["Launch | None"]) -> None:
        self.plan = plan
        self.tokens = [list(chunk.tokens) for chunk in plan]
        self.blocks = [[list(blocks) for blocks in blocks_of(chunk)] for chunk in plan]
        self.samples = [chunk.samples for chunk in plan]
        self.sources = sources  # of each chunk: the launch that samples its last token
        self.states: dict[str, list[bytes]] = {}
        self.error: Exception | None = None
        self.wanted: Plan | None = None


class LazyRunner(FakeRunner):
    """A `FakeRunner` in three parts. `fail_launch`, `fail_sample`, `fail_finish`: numbers of calls that raise."""

    def __init__(self, block_size: int, *, step_s: float = 0.0, **options: bool) -> None:
        super().__init__(block_size, step_s=step_s, **options)
        self._queue: deque[Launch] = deque()
        self._last: Launch | None = None  # that `sample` was called for
        self.launched = self.finished = self.ahead = 0  # calls; launches while another was not finished
        self.fail_launch: set[int] = set()
        self.fail_finish: set[int] = set()

    def run(self, plan: Plan) -> StepResult:
        launch = self.launch(plan, counted=False)
        self.sample(launch, plan)
        return self.finish(launch, counted=False)

    def launch(self, plan: Plan, *, counted: bool = True) -> Launch:
        self.launched += counted
        if counted and self.launched in self.fail_launch:
            raise MemoryError("no room for this launch")
        self.ahead += any(launch.wanted is not None for launch in self._queue)
        late = [chunk.tokens[-1] == LATE for chunk in plan]
        assert all(LATE not in chunk.tokens[:-1] for chunk in plan)
        sampled = set() if self._last is None else {chunk.sequence.id for chunk in self._last.wanted or ()}
        assert {chunk.sequence.id for chunk, is_late in zip(plan, late, strict=True) if is_late} <= sampled
        launch = Launch(plan, [self._last if is_late else None for is_late in late])
        self._queue.append(launch)
        return launch

    def sample(self, launched: Launch, plan: Plan) -> None:
        assert launched.wanted is None and set(map(id, plan)) <= set(map(id, launched.plan))
        for chunk in plan:
            assert LATE not in chunk.sequence.tokens, "the host samples before it knows the tokens"
        launched.wanted, self._last = plan, launched

    def finish(self, launched: Launch, *, counted: bool = True) -> StepResult:
        """Compute all launches up to this one."""
        assert launched.wanted is not None
        time.sleep(self._step_s)
        while launched in self._queue:
            self._compute(self._queue.popleft())
        self.finished += counted
        if launched.error is not None:
            raise launched.error
        if counted and self.finished in self.fail_finish:
            raise MemoryError("no room for the results")
        return self.result(launched.wanted, [launched.states[chunk.sequence.id] for chunk in launched.wanted])

    def _compute(self, launch: Launch) -> None:
        parts = zip(launch.plan, launch.tokens, launch.blocks, launch.sources, strict=True)
        for chunk, tokens, blocks, source in parts:
            id = chunk.sequence.id
            try:
                if source is not None:
                    tokens[-1] = token_of(source.states[id][0])
                launch.states[id] = self.compute_rows(chunk, tokens, blocks)
            except EngineDown:
                raise
            except Exception as error:
                launch.error = error


def build_overlapping(settings: EngineSettings) -> tuple[Engine, EngineInfo]:
    runner = LazyRunner(settings.block_size or 16, step_s=STEP_SECONDS.get(settings.model, 0.0))
    engine, info = build_fake(settings, runner)
    return Engine(runner, engine.scheduler, overlapping=runner), info


if __name__ == "__main__":
    sys.exit(main(builder=build_overlapping))
