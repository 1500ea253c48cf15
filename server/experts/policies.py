"""Which calibrated option a request gets that leaves the choice to the server, and what the tiers are.

Pure functions of options, bounds and a load. They do not depend on a clock, requests or the engine.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from model.errors import InvalidRequest
from server.experts.experts_object import Auto
from weights.calibration import Option

FAST, BALANCED = 0.90, 0.98  # relative quality that the tiers keep


@dataclass(frozen=True, slots=True)
class Load:
    """The state of the engine at one moment on which a step's time depends."""

    running: int  # sequences in the batch, with those that are about to start
    slowdown: float = 1.0  # steps take this many times as long as the calibration says


@dataclass(frozen=True, slots=True)
class Decision:
    """The option that a request gets, with the estimate for its bound."""

    option: Option
    predicted_itl_ms: float | None = None  # where there is a bound
    max_itl_ms: float | None = None

    @property
    def bound_met(self) -> bool | None:
        """Whether the option is expected to keep the bound; None without one."""
        if self.max_itl_ms is None or self.predicted_itl_ms is None:
            return None
        return self.predicted_itl_ms <= self.max_itl_ms


def predicted_itl(option: Option, load: Load) -> float | None:
    """Milliseconds of a decoding step at this load; None where the option's speed was not measured.

    Linear between the batches that were measured, and beyond the largest one as between the last two.
    """
    if option.speed is None or not option.speed.itl_ms:
        return None
    points = sorted((int(batch), milliseconds) for batch, milliseconds in option.speed.itl_ms.items())
    return load.slowdown * _on_line(points, load.running)


def _on_line(points: Sequence[tuple[int, float]], x: int) -> float:
    if len(points) == 1 or x <= points[0][0]:
        return points[0][1]
    right = next((index for index, (batch, _) in enumerate(points) if batch >= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def decide(options: Sequence[Option], auto: Auto, load: Load) -> Decision:
    """The option for a request.

    With `min_quality` the cheapest option that has it. With `max_itl_ms` the best one that is expected to keep the
    bound, and of equally good ones the cheapest; where none does, the fastest. With both, options below the quality are
    out of the question, also where the bound cannot be kept then.

    Raises:
        InvalidRequest: no option has the quality, or no speeds were measured.
    """
    allowed = _good_enough(options, auto.min_quality) if auto.min_quality is not None else tuple(options)
    if auto.max_itl_ms is None:
        return Decision(_cheapest(allowed))
    timed = [(option, itl) for option in allowed if (itl := predicted_itl(option, load)) is not None]
    if not timed:
        reason = "the calibration has no speeds; `moedial calibrate` measures them"
        raise InvalidRequest(f"experts.auto.max_itl_ms: {reason}", "experts.auto.max_itl_ms")
    within = [one for one in timed if one[1] <= auto.max_itl_ms]
    if within:
        option, itl = max(within, key=lambda one: (one[0].quality.relative, -one[0].relative_cost))
    else:
        option, itl = min(timed, key=lambda one: (one[1], -one[0].quality.relative))
    return Decision(option, itl, auto.max_itl_ms)


def _good_enough(options: Sequence[Option], floor: float) -> Sequence[Option]:
    found = [option for option in options if option.quality.relative >= floor]
    if not found:
        best = best_of(options)
        raise InvalidRequest(
            f"experts.auto.min_quality: no option has a relative quality of {floor:g}; "
            f"the best is {best.quality.relative:g}, of {best.name}",
            "experts.auto.min_quality",
        )
    return found


def _cheapest(options: Iterable[Option]) -> Option:
    return min(options, key=lambda option: (option.relative_cost, -option.quality.relative))


def best_of(options: Iterable[Option]) -> Option:
    """The option of the best quality; the cheapest of equally good ones."""
    return max(options, key=lambda option: (option.quality.relative, -option.relative_cost))


def tiers(options: Sequence[Option], fast: float = FAST) -> Mapping[str, Option]:
    """The options behind the aliases `@fast`, which keeps the quality `fast`, `@balanced` and `@best`; none without
    options.

    A quality that no option has makes the best one the tier.
    """
    if not options:
        return {}
    best = best_of(options)
    found = {"best": best}
    for name, floor in (("fast", fast), ("balanced", BALANCED)):
        found[name] = _cheapest([option for option in options if option.quality.relative >= floor] or [best])
    return {name: found[name] for name in ("fast", "balanced", "best")}


def loaded_cost(option: Option, among: Sequence[Option]) -> float:
    """What an option costs while many sequences run, to compare it with others `among` which it is: the time of a step
    of the largest batch that was measured of all of them, or else its relative cost."""
    speeds = [one.speed.itl_ms if one.speed else {} for one in among]
    common = set.intersection(*(set(speed) for speed in speeds))
    if option.speed is None or not common:
        return option.relative_cost
    return option.speed.itl_ms[max(common, key=int)]


def ladder(options: Sequence[Option], default: Option, floor: float) -> tuple[Option, ...]:
    """The default option and what may be run in its place, each cheaper under load than the one before, none below the
    quality `floor`.

    Options that cost as much as a better one are left out.
    """
    steps, cost = [default], {option.name: loaded_cost(option, options) for option in options}
    for option in sorted(options, key=lambda option: (-option.quality.relative, cost[option.name])):
        if option.quality.relative >= floor and cost[option.name] < cost[steps[-1].name]:
            steps.append(option)
    return tuple(steps)
