"""Statistics of a run as plain data, by expert count and over all. Every series has its number of values, n.

Latencies are in milliseconds, speeds in tokens per second. It depends on outcomes, not on tables or plots.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from terminal.bench.load import RunResult
from terminal.bench.outcome import RequestOutcome
from terminal.counts import Count, label, parts_of

FiguresRow = dict[str, Any]
SERIES = ("ttft_ms", "itl_ms", "e2e_ms", "stream_tokens_per_second")
BUSY_CLIENT = 0.8  # share of a core; above it the client probably limited the run
LATE_SECONDS = 0.01
CACHED_SHARE = 0.02  # share of the prompt tokens


def percentile(ordered: Sequence[float], share: float) -> float:
    """A percentile of sorted values, interpolated linearly as numpy does by default."""
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    step = ordered[high] - ordered[low]
    return ordered[low] + step * (position - low)


def summary(numbers: Iterable[float]) -> FiguresRow:
    """n, mean and percentiles of the values."""
    ordered = sorted(numbers)
    if not ordered:
        return {"n": 0, "mean": None, "p50": None, "p90": None, "p99": None}
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    mean = math.fsum(ordered) / len(ordered)
    figures: FiguresRow = {"n": len(ordered), "mean": round(mean, 3)}
    for name, share in shares.items():
        figures[name] = round(percentile(ordered, share), 3)
    return figures


def series(outcomes: Iterable[RequestOutcome], name: str) -> list[float]:
    """The values of one of SERIES, of successful requests."""
    successful = [outcome for outcome in outcomes if outcome.failure is None]
    match name:
        case "ttft_ms":
            return [o.ttft * 1000 for o in successful if o.ttft is not None]
        case "itl_ms":
            return [gap * 1000 for o in successful for gap in o.gaps]
        case "e2e_ms":
            return [(o.ended - o.began) * 1000 for o in successful]
        case _:
            return [o.speed for o in successful if o.speed is not None]


def by_count(outcomes: Iterable[RequestOutcome]) -> dict[Count | None, list[RequestOutcome]]:
    """The outcomes by count, in order; requests without a count come last."""
    groups: dict[Count | None, list[RequestOutcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.count, []).append(outcome)
    return {count: groups[count] for count in sorted(groups, key=_order)}


def _order(count: Count | None) -> tuple[float, ...]:
    return (math.inf,) if count is None else parts_of(count)


def errors(outcomes: Iterable[RequestOutcome]) -> dict[str, int]:
    """How many requests failed for which reason, the most frequent first."""
    return dict(Counter(outcome.failure.kind for outcome in outcomes if outcome.failure is not None).most_common())


def examples(outcomes: Iterable[RequestOutcome]) -> dict[str, str]:
    """The message of the first failure of each reason."""
    messages: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.failure is not None:
            messages.setdefault(outcome.failure.kind, str(outcome.failure))
    return messages


def row(name: int | str, outcomes: Sequence[RequestOutcome], seconds: float) -> FiguresRow:
    """The figures of one row."""
    successful = [outcome for outcome in outcomes if outcome.failure is None]
    tokens = sum(outcome.tokens for outcome in successful)
    return {
        "num_experts": name,
        "used": sorted({outcome.used for outcome in successful if outcome.used is not None}),
        "requests": len(outcomes),
        "ok": len(successful),
        "errors": errors(outcomes),
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in successful),
        "cached_tokens": sum(outcome.cached for outcome in successful),
        "completion_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 3),
        **{name: summary(series(outcomes, name)) for name in SERIES},
    }


def rows(run: RunResult) -> list[FiguresRow]:
    """One per count, then one over all."""
    counts = by_count(run.outcomes)
    named = [(count if isinstance(count, int) else label(count), outcomes) for count, outcomes in counts.items()]
    found = [row(name, outcomes, run.seconds) for name, outcomes in named]
    return [*found, row("all", run.outcomes, run.seconds)]


def warnings(run: RunResult, warm: RunResult) -> list[str]:
    """Reasons to doubt the figures, in words."""
    late = percentile(sorted(outcome.late for outcome in run.outcomes), 0.99)
    found = [f"{number} of the warm-up failed: {kind}" for kind, number in errors(warm.outcomes).items()]
    if run.unfinished:
        found.append(f"stopped by Ctrl-C: {run.unfinished} requests had not ended and are in no figure")
    prompt = sum(outcome.prompt_tokens for outcome in run.outcomes)
    cached = sum(outcome.cached for outcome in run.outcomes)
    if cached > CACHED_SHARE * prompt:
        found.append(
            f"{cached / prompt:.0%} of the prompt tokens came from the server's prefix cache; another --seed "
            "asks for other texts"
        )
    if run.busy > BUSY_CLIENT:
        found.append(f"this client used {run.busy:.0%} of a core: it may be what was measured")
    if late > LATE_SECONDS:
        found.append(f"1 % of the requests left {late * 1000:.0f} ms or more after their planned arrival")
    return found
