"""Every Prometheus series, as data, in one registry of our own. All live in the HTTP process.

Fed by step reports and by `server/lifecycle.py`; nothing here decides when something is counted.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from engine.types import StepReport, StepStats
from model.budget import ExpertBudget

PREFIX = "moedial:"
ENGINE = "0"
# fmt: off
FIRST = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
    640, 2560,
)
TOKEN = (
    0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5,
    5, 7.5, 10, 20, 40, 80,
)
WHOLE = (
    0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
    7680,
)
# fmt: on
EXPERTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
RATIO = (0.25, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10)
K = ("num_experts",)


@dataclass(frozen=True, slots=True)
class Series:
    """One series; `labels` come after `model_name` and `engine`, which all have."""

    kind: type[Counter] | type[Gauge] | type[Histogram]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


SERIES = (
    Series(Histogram, "time_to_first_token_seconds", "Arrival at HTTP to first token", K, FIRST),
    Series(Histogram, "inter_token_latency_seconds", "Between two tokens of a sequence", K, TOKEN),
    Series(Histogram, "request_time_per_output_token_seconds", "Mean of a sequence, first token apart", K, TOKEN),
    Series(Histogram, "e2e_request_latency_seconds", "Arrival at HTTP to the end of a finished sequence", K, WHOLE),
    Series(Histogram, "request_queue_time_seconds", "Waiting, at HTTP and in the engine", K, WHOLE),
    Series(Histogram, "request_prefill_time_seconds", "First scheduled to first token", (), WHOLE),
    Series(Histogram, "request_decode_time_seconds", "First to last token", (), WHOLE),
    Series(Histogram, "request_inference_time_seconds", "Prefill and decode", (), WHOLE),
    Series(Histogram, "request_num_experts", "Expert count of an admitted sequence, mean over layers", (), EXPERTS),
    Series(Histogram, "step_time_over_estimate", "Time of an engine step over what was expected of it", (), RATIO),
    Series(Counter, "prompt_tokens", "Prompt tokens of sequences that got a first token", K),
    Series(Counter, "generation_tokens", "Tokens generated", K),
    Series(Counter, "request_success", "Sequences finished", ("finished_reason", *K)),
    Series(Counter, "requests_rejected", "Requests refused, before they ran", ("reason",)),
    Series(Counter, "requests_failed", "Sequences that ended with an error", ("type",)),
    Series(Counter, "requests_aborted", "Sequences given up, mostly because the caller had gone"),
    Series(Counter, "request_unknown_fields", "Body fields that were accepted and ignored"),
    Series(Counter, "num_preemptions", "Sequences set back for lack of KV blocks"),
    Series(Counter, "prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    Series(Counter, "prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    Series(Counter, "spec_decode_num_draft_tokens", "Tokens guessed ahead"),
    Series(Counter, "spec_decode_num_accepted_tokens", "Of these, right"),
    Series(Counter, "routed_pairs", "(token, expert) computations done"),
    Series(Counter, "routed_pairs_saved", "Computations saved against the trained count"),
    Series(Counter, "step_mixed", "Engine steps that held more than one budget"),
    Series(Gauge, "num_requests_running", "Sequences in the engine's batch"),
    Series(Gauge, "num_requests_waiting", "Sequences waiting, at HTTP and in the engine"),
    Series(Gauge, "kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1"),
    Series(Gauge, "engine_up", "1 while the engine takes work"),
    Series(Gauge, "default_num_experts", "Expert count of a request that asks for none"),
    Series(Gauge, "step_unique_experts", "Distinct experts touched by the last step, summed over layers"),
    Series(Gauge, "expert_load_imbalance", "Busiest expert's pairs over the mean, last step, mean over layers"),
)


class Metrics:
    """`inc`, `observe` and `watch` by name; children are created on first use and kept."""

    def __init__(self, model_name: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._own = (model_name, ENGINE)
        self._families = {series.name: self._family(series) for series in SERIES}
        self._children: dict[tuple[str, ...], Any] = {}
        self._counts: frozenset[int] = frozenset()
        self.last: StepStats | None = None

    def _family(self, series: Series) -> Counter | Gauge | Histogram:
        labels = ("model_name", "engine", *series.labels)
        if series.kind is Histogram:
            return Histogram(PREFIX + series.name, series.help, labels, registry=self.registry, buckets=series.buckets)
        return series.kind(PREFIX + series.name, series.help, labels, registry=self.registry)

    def _child(self, *key: str) -> Any:
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = self._families[key[0]].labels(*self._own, *key[1:])
        return child

    def inc(self, name: str, *labels: str, by: float = 1) -> None:
        self._child(name, *labels).inc(by)

    def observe(self, name: str, value: float, *labels: str) -> None:
        self._child(name, *labels).observe(value)

    def watch(self, name: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        self._child(name).set_function(read)

    def know_counts(self, counts: Iterable[int]) -> None:
        self._counts = frozenset(counts)

    def label(self, budget: ExpertBudget) -> str:
        """The budget as a label from a closed set, whatever callers ask for."""
        first = budget.per_layer[0] if budget.per_layer else -1
        uniform = all(count == first for count in budget.per_layer)
        return str(first) if uniform and first in self._counts else "other"

    def on_report(self, report: StepReport) -> None:
        stats = self.last = report.stats
        for name, amount in (
            ("num_preemptions", stats.preemptions),
            ("prefix_cache_queries", stats.prefix_queries),
            ("prefix_cache_hits", stats.prefix_hits),
            ("spec_decode_num_draft_tokens", stats.drafted),
            ("spec_decode_num_accepted_tokens", stats.accepted),
            ("routed_pairs", stats.routed_pairs),
            ("routed_pairs_saved", max(0, stats.trained_pairs - stats.routed_pairs)),
            ("step_mixed", int(stats.mixed)),
        ):
            self.inc(name, by=amount)
        if stats.estimated_s > 0:
            self.observe("step_time_over_estimate", stats.seconds / stats.estimated_s)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


def metrics_table() -> str:
    """All series as a markdown table, for the docs."""
    rows = ["| series | kind | labels | meaning |", "|---|---|---|---|"]
    for series in SERIES:
        suffix = "_total" if series.kind is Counter else ""
        labels = ", ".join(f"`{label}`" for label in ("model_name", "engine", *series.labels))
        rows.append(f"| `{PREFIX}{series.name}{suffix}` | {series.kind.__name__.lower()} | {labels} | {series.help} |")
    return "\n".join(rows) + "\n"
