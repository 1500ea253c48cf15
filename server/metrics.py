"""Every Prometheus series, declared as data, in one registry. All are kept in the HTTP process.

They are fed by step reports and by `server/generation/timeline.py`; nothing here decides when something is counted.
Counting happens for every token, on one thread, as plain arithmetic; prometheus-client formats it at a scrape.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from engine.types import StepReport, StepStats
from model.budget import ExpertBudget
from server.processes import process_rows

PREFIX = "moedial:"
ENGINE = "0"
# fmt: off
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
    640, 2560,
)
TOKEN_BUCKETS = (
    0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5,
    5, 7.5, 10, 20, 40, 80,
)
REQUEST_BUCKETS = (
    0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
    7680,
)
# fmt: on
COUNT_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
TOKEN_COUNT_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
RATIO_BUCKETS = (0.25, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)
COUNT_LABEL = ("num_experts",)
NO_ROUTE = "none"  # route and method of what is refused before it is a whole request


@dataclass(frozen=True, slots=True)
class Series:
    """One series; `labels` come after `model_name` and `engine`, which all series have."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


SERIES = (
    Series(
        "histogram", "time_to_first_token_seconds", "Arrival at HTTP to first token", COUNT_LABEL, FIRST_TOKEN_BUCKETS
    ),
    Series(
        "histogram",
        "inter_token_latency_seconds",
        "Between two tokens of a sequence, when they were made",
        COUNT_LABEL,
        TOKEN_BUCKETS,
    ),
    Series(
        "histogram",
        "request_time_per_output_token_seconds",
        "Mean of a sequence, first token apart",
        COUNT_LABEL,
        TOKEN_BUCKETS,
    ),
    Series(
        "histogram",
        "e2e_request_latency_seconds",
        "Arrival at HTTP to the end of a finished sequence",
        COUNT_LABEL,
        REQUEST_BUCKETS,
    ),
    Series(
        "histogram", "request_queue_time_seconds", "Waiting, at HTTP and in the engine", COUNT_LABEL, REQUEST_BUCKETS
    ),
    Series("histogram", "request_prefill_time_seconds", "First scheduled to first token", (), REQUEST_BUCKETS),
    Series("histogram", "request_decode_time_seconds", "First to last token", (), REQUEST_BUCKETS),
    Series("histogram", "request_inference_time_seconds", "Prefill and decode", (), REQUEST_BUCKETS),
    Series("histogram", "request_prompt_tokens", "Prompt tokens of a finished sequence", (), TOKEN_COUNT_BUCKETS),
    Series("histogram", "request_generation_tokens", "Tokens of a finished sequence", (), TOKEN_COUNT_BUCKETS),
    Series(
        "histogram",
        "request_num_experts",
        "Expert count of a sequence that ran, mean over its tokens and layers",
        (),
        COUNT_BUCKETS,
    ),
    Series(
        "histogram", "step_time_over_estimate", "Time of an engine step over what was expected of it", (), RATIO_BUCKETS
    ),
    Series("counter", "prompt_tokens", "Prompt tokens read, once per prompt however many answers it has", COUNT_LABEL),
    Series("counter", "generation_tokens", "Tokens generated", COUNT_LABEL),
    Series("counter", "cost", "What was read and generated at --prices, in --currency", COUNT_LABEL),
    Series("counter", "request_success", "Sequences finished", ("finished_reason", *COUNT_LABEL)),
    Series("counter", "requests_rejected", "Requests refused, before they ran", ("reason",)),
    Series(
        "counter", "http_requests", "HTTP answers, by route template, when they began", ("route", "method", "status")
    ),
    Series("counter", "requests_failed", "Sequences that ended with an error", ("type",)),
    Series("counter", "requests_aborted", "Sequences given up, mostly because the caller had gone"),
    Series("counter", "request_unknown_fields", "Body fields that were accepted and ignored"),
    Series("counter", "request_skipped_tools", "Tools of unknown kinds that were left out of requests"),
    Series("counter", "key_requests", "POST requests of an API key, by its name, that were let in", ("key",)),
    Series(
        "counter",
        "key_requests_limited",
        "Requests of an API key refused by its limits: requests or tokens per minute, or places",
        ("key", "limit"),
    ),
    Series(
        "counter",
        "key_tokens",
        "Tokens of an API key: of accepted prompts, and generated, once the sequence has ended",
        ("key", "kind"),
    ),
    Series("counter", "num_preemptions", "Sequences preempted for lack of KV blocks"),
    Series("counter", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache, once per sequence"),
    Series("counter", "prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    Series("counter", "prefix_snapshots_displaced", "Snapshots of recurrent states dropped to make room for others"),
    Series("counter", "spec_decode_num_draft_tokens", "Draft tokens proposed by speculation"),
    Series("counter", "spec_decode_num_accepted_tokens", "Draft tokens that were accepted"),
    Series("counter", "routed_pairs", "(token, expert) computations done"),
    Series("counter", "routed_pairs_saved", "Computations saved against the trained count"),
    Series("counter", "contrast_tokens", "Tokens computed a second time, for self-contrast decoding"),
    Series(
        "counter",
        "experts_lowered",
        "Sequences that ran with a cheaper option than the default, since they named none",
        ("reason",),
    ),
    Series("counter", "step_mixed", "Engine steps that held more than one budget"),
    Series("counter", "step_retries", "Runs of parts of engine steps that had failed, to find the request at fault"),
    Series("counter", "grammar_step_seconds", "Seconds that engine steps waited for grammars' masks and applied them"),
    Series("counter", "log_lines_dropped", "Log lines that were not written, since their reader was too slow"),
    Series("gauge", "num_requests_running", "Sequences in the engine's batch"),
    Series("gauge", "num_requests_waiting", "Sequences waiting, at HTTP and in the engine"),
    Series("gauge", "oldest_waiting_seconds", "How long the sequence that waits longest has waited"),
    Series("gauge", "kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1"),
    Series("gauge", "prefix_snapshots", "Snapshots of recurrent states that the prefix cache keeps"),
    Series("gauge", "prefix_snapshot_bytes", "Bytes of these snapshots"),
    Series(
        "gauge",
        "cache_config_info",
        "1; its labels say how many KV blocks there are, and of how many tokens",
        ("block_size", "num_gpu_blocks"),
    ),
    Series("gauge", "http_body_bytes", "Bytes of request bodies held, beyond the first 64 KiB of each"),
    Series("gauge", "engine_info", "1; its labels say what the model runs on", ("device", "backend", "kernels")),
    Series("gauge", "engine_up", "1 while the engine takes work"),
    Series("counter", "engine_restarts", "Engine processes started after one had ended or hung"),
    Series("gauge", "engine_seconds_since_report", "Since the engine last said anything; idle, it is asked every 2 s"),
    Series("gauge", "default_num_experts", "Expert count of a request that asks for none"),
    Series("gauge", "brownout_level", "Options below the default that --brownout stands at; 0: none"),
    Series("gauge", "brownout_lowest_level", "The level beyond which --brownout-quality lets nothing be lowered"),
    Series("gauge", "brownout_relative_quality", "Calibrated quality of what a request without a count gets now"),
    Series("gauge", "step_unique_experts", "Distinct experts touched by the last step, summed over layers"),
    Series("gauge", "expert_load_imbalance", "Busiest expert's pairs over the mean, last step, mean over layers"),
)


class HistogramBuffer:
    """The values of one histogram and its labels: a count per bucket, the last one without a bound, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.sum = bounds, 0.0
        self.counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """The bounds as text, and how many values are at or below each."""
        names = [floatToGoString(bound) for bound in (*self.bounds, float("inf"))]  # type: ignore[no-untyped-call]
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))


SeriesKey = tuple[str, ...]  # the name of a series and the values of its own labels


class Metrics:
    """Counts by the names of series. It is the only collector of its registry."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self._common_labels = [model_name, ENGINE]
        self._bounds = {series.name: series.buckets for series in SERIES}
        unlabelled = [series.name for series in SERIES if series.kind == "counter" and not series.labels]
        self._counters: dict[SeriesKey, float] = {(name,): 0.0 for name in unlabelled}
        self._histograms: dict[SeriesKey, HistogramBuffer] = {}
        self._watched: dict[SeriesKey, Callable[[], float]] = {}
        self._labelled_counts: frozenset[int] = frozenset()
        self.last: StepStats | None = None
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def inc(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter."""
        key = (name, *labels)
        self._counters[key] = self._counters.get(key, 0.0) + by

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add a value to a histogram."""
        self.histogram_buffer(name, *labels).add(value)

    def histogram_buffer(self, name: str, *labels: str) -> HistogramBuffer:
        """The buffer of one histogram and its labels, for callers that add to it often."""
        key = (name, *labels)
        buffer = self._histograms.get(key)
        if buffer is None:
            buffer = self._histograms[key] = HistogramBuffer(self._bounds[name])
        return buffer

    def watch(self, name: str, read: Callable[[], float], *labels: str) -> None:
        """Let a gauge or counter be read by `read` at every scrape."""
        self._watched[name, *labels] = read

    def collect(self) -> Iterator[Metric]:
        """Every series with its values; the registry calls this."""
        for series in SERIES:
            name, labels = PREFIX + series.name, ("model_name", "engine", *series.labels)
            if series.kind == "counter":
                counter = CounterMetricFamily(name, series.help, labels=labels)
                for key in self._of(self._counters, series):
                    value = self._watched[key]() if key in self._watched else self._counters[key]
                    counter.add_metric([*self._common_labels, *key[1:]], value)
                yield counter
            elif series.kind == "gauge":
                gauge = GaugeMetricFamily(name, series.help, labels=labels)
                for key in self._of(self._watched, series):
                    values = [*self._common_labels, *key[1:]]
                    gauge.add_metric(values, self._watched[key]())
                yield gauge
            else:
                histogram = HistogramMetricFamily(name, series.help, labels=labels)
                for key in self._of(self._histograms, series):
                    buffer = self._histograms[key]
                    values = [*self._common_labels, *key[1:]]
                    histogram.add_metric(values, buffer.buckets(), buffer.sum)
                yield histogram

    @staticmethod
    def _of(store: Iterable[SeriesKey], series: Series) -> list[SeriesKey]:
        return [key for key in store if key[0] == series.name]

    def set_count_labels(self, counts: Iterable[int]) -> None:
        """Set the expert counts that are labels of their own; all others are counted as "other"."""
        self._labelled_counts = frozenset(counts)

    def label(self, budget: ExpertBudget) -> str:
        """The budget as a label from a closed set, whatever callers ask for."""
        count = budget.uniform
        return str(count) if count in self._labelled_counts else "other"

    def on_report(self, report: StepReport) -> None:
        """Count what one engine step did."""
        stats = self.last = report.stats
        for name, amount in (
            ("num_preemptions", stats.preemptions),
            ("prefix_cache_queries", stats.prefix_queries),
            ("prefix_cache_hits", stats.prefix_hits),
            ("prefix_snapshots_displaced", stats.snapshots_displaced),
            ("spec_decode_num_draft_tokens", stats.drafted),
            ("spec_decode_num_accepted_tokens", stats.accepted),
            ("routed_pairs", stats.routed_pairs),
            ("routed_pairs_saved", max(0, stats.trained_pairs - stats.routed_pairs)),
            ("contrast_tokens", stats.contrast_tokens),
            ("step_mixed", int(stats.mixed)),
            ("step_retries", stats.retries),
            ("grammar_step_seconds", stats.masks_s),
        ):
            if amount:
                self.inc(name, by=amount)
        if stats.estimated_s > 0:
            self.observe("step_time_over_estimate", stats.seconds / stats.estimated_s)

    def exposition(self) -> bytes:
        """The answer to a scrape."""
        return generate_latest(self.registry)


def metrics_table() -> str:
    """All series as a markdown table, for the docs."""
    rows = ["| series | kind | labels | meaning |", "|---|---|---|---|"]
    for series in SERIES:
        suffix = "_total" if series.kind == "counter" else ""
        labels = ", ".join(f"`{label}`" for label in ("model_name", "engine", *series.labels))
        name = f"`{PREFIX}{series.name}{suffix}`"
        rows.append(f"| {name} | {series.kind} | {labels} | {series.help} |")
    return "\n".join([*rows, *process_rows()]) + "\n"
