"""The brownout of a server: which calibrated option replaces the default at the present load.

It passes the load to the state machine (`server/experts/brownout.py`), and logs each change. It does not depend on
requests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from model.errors import InvalidRequest
from model.expert_range import ExpertRange
from server.experts.brownout import Brownout, Pressure
from server.experts.load import LoadMeter
from server.experts.options import CalibratedOptions
from server.experts.policies import ladder, loaded_cost
from server.settings import Settings
from weights.calibration import Option

log = structlog.get_logger("server")
TICK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Queue:
    """The state of the queue at one moment."""

    waiting: int
    oldest_wait_s: float
    running: int  # sequences that hold a slot


def steps_of(settings: Settings, options: CalibratedOptions, experts: ExpertRange, default: int) -> tuple[Option, ...]:
    """The default option and what brownout may run in its place; none if the settings want no brownout.

    Raises:
        InvalidRequest: there is no calibration, or it lacks the default count.
    """
    if not settings.brownout:
        return ()
    budget = experts.budget(default, "default_num_experts")
    found = next((one for one in options.require("--brownout") if one.budget == budget), None)
    if found is None:
        missing = f"--brownout needs a calibration that has the default count, {default}"
        raise InvalidRequest(f"{missing}; `moedial calibrate` makes one")
    return ladder(options.options, found, settings.brownout_quality)


class Lowering:
    """`steps` as of `steps_of`, at least one. `slots`: sequences that the batch has room for."""

    def __init__(self, steps: Sequence[Option], meter: LoadMeter, slots: int, max_itl_ratio: float) -> None:
        self._steps, self._meter, self._slots = steps, meter, slots
        costs = [loaded_cost(option, steps) for option in steps]
        self._brownout = Brownout(costs, max_itl_ratio or math.inf)
        names = [option.name for option in steps]
        if len(names) == 1:
            log.warning("brownout can lower nothing: no cheaper option keeps the quality", default=names[0])
        else:
            log.info("brownout may lower experts", options=names, relative_quality=steps[-1].quality.relative)

    @property
    def level(self) -> int:
        """How many steps below the default; 0: none."""
        return self._brownout.level

    @property
    def lowest_level(self) -> int:
        """The level at which the least quality that is allowed is reached."""
        return len(self._steps) - 1

    @property
    def relative_quality(self) -> float:
        """The relative quality of the option that a request without a count gets now."""
        return self._steps[self.level].quality.relative

    @property
    def option(self) -> Option | None:
        """The option that replaces the default; None: the default itself."""
        return self._steps[self.level] if self.level else None

    def tick(self, now: float, queue: Queue) -> None:
        """Update the level by the load at `now`."""
        running, ratio = self._meter.running(now), self._meter.itl_ratio(now)
        if not queue.running:  # the averages are of steps, and an idle engine runs none
            running = ratio = 0.0
        pressure = Pressure(queue.waiting, queue.oldest_wait_s, ratio, running, self._slots)
        before = self.level
        if self._brownout.update(now, pressure):
            change = "brownout lowers experts" if self.level > before else "brownout raises experts again"
            log.warning(
                change,
                level=self.level,
                option=self._steps[self.level].name,
                relative_quality=self.relative_quality,
                waiting=queue.waiting,
                oldest_wait_s=round(queue.oldest_wait_s, 3),
                itl_ratio=round(ratio, 2),
                running=round(running, 1),
            )
