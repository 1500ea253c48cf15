"""The `usage` and `metrics` objects of an answer, computed from the timelines of a request's sequences."""

from collections.abc import Mapping, Sequence
from typing import Any

from server.experts.selection import rounded
from server.formats.cost import cost_fields
from server.generation.output_processor import Delta
from server.generation.passes import PassUsage
from server.generation.timeline import Timeline
from server.requests.calls import GenerationCall, mean_num_experts

OPENAI_FIELDS = (
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
    "prompt_tokens_details",
    "completion_tokens_details",
)


def usage_of(call: GenerationCall, shown: Mapping[int, int] | None = None) -> dict[str, Any]:
    """The `usage` object. A prompt counts once in each pass however many answers it has, as OpenAI counts.

    `shown`, in a stream: the tokens of each answer that its client has so far.
    """
    passes, runs = call.passes(shown), call.generation.runs
    prompt = sum(used.prompt_tokens for used in passes)
    completion = sum(used.completion_tokens for used in passes)
    cached = sum(used.cached_tokens for used in passes)
    reasoning = sum(sequence.output.reasoning_tokens for sequence in runs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
        "num_experts": mean_num_experts(passes),
        **_pairs([sequence.timeline for sequence in runs]),
        **_option(call),
        **_cascade(call, passes),
        **cost_fields(call.prices, passes),
    }


def own_fields(usage: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a usage that OpenAI's does not have; other APIs, which name the rest differently, have them too."""
    return {field: value for field, value in usage.items() if field not in OPENAI_FIELDS}


def usage_wanted(call: GenerationCall) -> bool:
    """Whether a stream ends with the usage."""
    options = call.body.stream_options
    return options is not None and options.include_usage


def usage_in_chunks(call: GenerationCall) -> bool:
    """Whether every chunk has the usage so far."""
    options = call.body.stream_options
    return options is not None and options.continuous_usage_stats


class RunningUsage:
    """The usage so far, for streams in which every chunk carries it."""

    def __init__(self, call: GenerationCall) -> None:
        self.call, self.wanted = call, usage_in_chunks(call)
        self._tokens: dict[int, int] = {}  # by answer

    def update(self, delta: Delta) -> None:
        """Count the tokens up to `delta`, whose chunks come next."""
        if self.wanted:
            self._tokens[delta.index] = delta.tokens

    def fields(self) -> dict[str, Any]:
        """The fields to add to the next chunk."""
        if not self.wanted:
            return {}
        return {"usage": usage_of(self.call, self._tokens)}


def metrics_of(call: GenerationCall) -> dict[str, Any]:
    """The `metrics` object, with vLLM's names: milliseconds, and null where nothing was measured."""
    timelines = [sequence.timeline for sequence in call.generation.runs]
    returned = [sequence.timeline for sequence in call.generation.sequences]
    answered = [timeline for timeline in returned if timeline.first_token_at is not None]
    option = {"experts_option": report["option"]} if (report := call.choice.report()) else {}
    return {**_times(answered), "num_experts": call.num_experts, **_pairs(timelines), **option}


def _option(call: GenerationCall) -> dict[str, Any]:
    """The option of the calibration that the call got, where the server chose it or the request named it."""
    report = call.choice.report()
    return {} if report is None else {"experts": report}


def _cascade(call: GenerationCall, passes: Sequence[PassUsage]) -> dict[str, Any]:
    """What each run of a cascade used, and for each answer which run it is and what was measured of both."""
    cascade = call.choice.cascade
    if cascade is None:
        return {}
    first, again = call.generation.passes
    answers = [
        {
            "returned": "high" if position in again else "low",
            "low": round(sequence.output.mean_measured, 6),
            "high": round(again[position].output.mean_measured, 6) if position in again else None,
        }
        for position, sequence in first.items()
    ]
    runs: dict[str, Any] = {"low": _run(passes[0]), "high": _run(passes[1]) if len(passes) > 1 else None}
    return {"cascade": {"by": cascade.by, "threshold": cascade.threshold, **runs, "answers": answers}}


def _run(used: PassUsage) -> dict[str, Any]:
    return {
        "num_experts": rounded(used.mean_count),
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
    }


def _pairs(timelines: list[Timeline]) -> dict[str, int]:
    """The work of all sequences: the pairs computed, and those that the trained count would have needed.

    Tokens found in the prefix cache count in neither. With self-contrast also the rows that were computed, two for each
    token; the pairs are those of both.
    """
    pairs = {
        "routed_pairs": sum(timeline.routed_pairs for timeline in timelines),
        "routed_pairs_trained": sum(timeline.routed_pairs_trained for timeline in timelines),
    }
    if any(timeline.budget.contrast for timeline in timelines):
        pairs["computed_rows"] = sum(timeline.budget.rows * timeline.computed_tokens for timeline in timelines)
    return pairs


def _times(timelines: list[Timeline]) -> dict[str, float | None]:
    if not timelines:
        names = ("time_to_first_token_ms", "queue_time_ms", "generation_time_ms", "mean_itl_ms", "tokens_per_second")
        return dict.fromkeys(names)
    first = min(timeline.first_token_at or 0.0 for timeline in timelines)
    arrived, last = timelines[0].arrived, max(timeline.last_token_at for timeline in timelines)
    gaps = sum(timeline.last_token_at - (timeline.first_token_at or 0.0) for timeline in timelines)
    steps = sum(timeline.tokens - 1 for timeline in timelines)
    tokens = sum(timeline.tokens for timeline in timelines)
    queue = max(timeline.queue_s for timeline in timelines)
    speed = tokens / (last - arrived) if last > arrived else None
    return {
        "time_to_first_token_ms": _ms(first - arrived),
        "queue_time_ms": _ms(queue),
        "generation_time_ms": _ms(last - first),
        "mean_itl_ms": _ms(gaps / steps) if steps else None,
        "tokens_per_second": None if speed is None else round(speed, 2),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
