"""Steps that take just what they cost, on a clock that nothing else moves: for tests of who waits how long."""

import random
from itertools import pairwise

from engine.blocks import BlockManager
from engine.cost import StepCost
from engine.plan import Plan
from engine.scheduler import Scheduler
from engine.types import Request
from tests.engine.costs import COST, LAYERS, seconds
from tests.engine.fake import FakeRunner, request

SIZE, LEAST, TARGET = 16, 16, 0.02
WEAK, STRONG = (1,) * LAYERS, (8,) * LAYERS
MIN_SECONDS = COST.seconds(LEAST, LEAST * sum(STRONG), 16 * LAYERS) - COST.fixed  # a least chunk's, at most


class Clock:
    """Stands still until a simulation moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(
    cost: StepCost | None = COST,
    target: float = TARGET,
    chunked: bool = True,
    least: int = LEAST,
    running: int = 16,
    blocks: int = 1000,
) -> Scheduler:
    manager = BlockManager(blocks, SIZE, prefix_cache=chunked)
    clock = Clock()
    return Scheduler(manager, running, 512, 2000, chunked, clock, cost=cost, step_seconds=target, min_chunk=least)


def asks(id: str, length: int, budget: tuple[int, ...], max_tokens: int = 20) -> Request:
    """A prompt that shares no prefix with another's."""
    rng = random.Random(id)
    return request(id, tuple(rng.randrange(1000) for _ in range(length)), max_tokens, budget=budget)


class Simulation:
    """Steps that take just what they cost, on a clock of their own; what was planned, and when each token came."""

    def __init__(self, scheduler: Scheduler) -> None:
        assert isinstance(scheduler._clock, Clock)
        self.scheduler, self.clock = scheduler, scheduler._clock
        self.runner = FakeRunner(SIZE, mixing=not scheduler._chunked)
        self.plans: list[dict[str, int]] = []
        self.asked: dict[str, float] = {}
        self.came: dict[str, list[float]] = {}

    def add(self, request: Request) -> None:
        self.asked[request.id] = self.clock.now
        self.scheduler.add(request)

    def step(self) -> Plan:
        plan = self.scheduler.schedule()
        self.plans.append({chunk.sequence.id: chunk.length for chunk in plan})
        self.clock.now += seconds(COST, plan)
        for event in self.scheduler.commit(plan, self.runner.run(plan).sampled):
            if event.token is not None:
                self.came.setdefault(event.request_id, []).append(self.clock.now)
        self.scheduler.check()
        return plan

    def finish(self) -> "Simulation":
        while self.scheduler.has_work:
            self.step()
            assert len(self.plans) < 5000, "there is still work"
        return self

    def waited(self, id: str) -> float:
        """Time to first token."""
        return self.came[id][0] - self.asked[id]

    def gap(self, id: str) -> float:
        """The longest time between two tokens of a request."""
        return max(later - sooner for sooner, later in pairwise(self.came[id]))


def beside_a_neighbour(scheduler: Scheduler, *requests: Request) -> Simulation:
    """A K=1 request decodes when the others arrive."""
    simulation = Simulation(scheduler)
    simulation.add(asks("neighbour", 10, WEAK, max_tokens=400))
    simulation.step()
    for each in requests:
        simulation.add(each)
    return simulation
