"""Statistics of a run, as plain data: by count and over all. Nothing is left out in silence: every series says its n.

Latencies in milliseconds, speeds in tokens per second. It knows outcomes, no table and no plot.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from terminal.bench.load import Run
from terminal.bench.outcome import Outcome
from terminal.counts import Count, label, parts_of

Row = dict[str, Any]
SERIES = ("ttft_ms", "itl_ms", "e2e_ms", "stream_tokens_per_second")
BUSY = 0.8  # share of a core from which on the client is likely to be what was measured
LATE = 0.01  # seconds
CACHED = 0.02  # share of the prompt tokens


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values, linear between neighbours, as numpy's default."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Iterable[float]) -> Row:
    ordered = sorted(values)
    if not ordered:
        return {"n": 0, "mean": None, "p50": None, "p90": None, "p99": None}
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    mean = math.fsum(ordered) / len(ordered)
    points = {name: percentile(ordered, share) for name, share in shares.items()}
    return {"n": len(ordered)} | {name: round(value, 3) for name, value in {"mean": mean, **points}.items()}


def series(outcomes: Iterable[Outcome], name: str) -> list[float]:
    """One of SERIES, of the requests that went well."""
    good = [outcome for outcome in outcomes if outcome.failure is None]
    match name:
        case "ttft_ms":
            return [o.ttft * 1000 for o in good if o.ttft is not None]
        case "itl_ms":
            return [gap * 1000 for o in good for gap in o.gaps]
        case "e2e_ms":
            return [(o.ended - o.began) * 1000 for o in good]
        case _:
            return [o.speed for o in good if o.speed is not None]


def by_count(outcomes: Iterable[Outcome]) -> dict[Count | None, list[Outcome]]:
    """In order of the counts, requests that did not say one last."""
    groups: dict[Count | None, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.count, []).append(outcome)
    return dict(sorted(groups.items(), key=lambda item: _place(item[0])))


def _place(count: Count | None) -> tuple[float, ...]:
    return (math.inf,) if count is None else parts_of(count)


def errors(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many failed for which reason, the most frequent first."""
    return dict(Counter(outcome.failure.kind for outcome in outcomes if outcome.failure is not None).most_common())


def examples(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """What the first failure of each reason said."""
    said: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.failure is not None:
            said.setdefault(outcome.failure.kind, str(outcome.failure))
    return said


def row(name: int | str, outcomes: Sequence[Outcome], seconds: float) -> Row:
    good = [outcome for outcome in outcomes if outcome.failure is None]
    tokens = sum(outcome.tokens for outcome in good)
    return {
        "num_experts": name,
        "used": sorted({outcome.used for outcome in good if outcome.used is not None}),
        "requests": len(outcomes),
        "ok": len(good),
        "errors": errors(outcomes),
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in good),
        "cached_tokens": sum(outcome.cached for outcome in good),
        "completion_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 3),
        **{name: spread(series(outcomes, name)) for name in SERIES},
    }


def rows(run: Run) -> list[Row]:
    """One per count, then one over all."""
    counts = by_count(run.outcomes)
    named = [row(c if isinstance(c, int) else label(c), outcomes, run.seconds) for c, outcomes in counts.items()]
    return [*named, row("all", run.outcomes, run.seconds)]


def doubts(run: Run, warm: Run) -> list[str]:
    """Why one should not quite believe the figures, in words."""
    late = percentile(sorted(outcome.late for outcome in run.outcomes), 0.99)
    found = [f"{number} of the warm-up failed: {kind}" for kind, number in errors(warm.outcomes).items()]
    if run.unfinished:
        found.append(f"stopped by Ctrl-C: {run.unfinished} requests had not ended and are in no figure")
    prompt, cached = (sum(getattr(o, name) for o in run.outcomes) for name in ("prompt_tokens", "cached"))
    if cached > CACHED * prompt:
        found.append(
            f"{cached / prompt:.0%} of the prompt tokens came from the server's prefix cache; another --seed "
            "asks for other texts"
        )
    if run.busy > BUSY:
        found.append(f"this client used {run.busy:.0%} of a core: it may be what was measured")
    if late > LATE:
        found.append(f"1 % of the requests left {late * 1000:.0f} ms or more after their planned arrival")
    return found
