"""The series that tools for vLLM read, under vLLM's names: the server's own values, summed over expert counts.

What reads them: autoscalers and gateways (the queue, the cache), and boards (tokens, latencies). Names of older
versions that are still read are here as well. It counts nothing itself.
"""

from collections.abc import Iterable, Iterator

from prometheus_client.core import Metric

from server.metrics import COUNT_LABEL, PREFIX, SERIES, Metrics

VLLM_PREFIX = "vllm:"
OLD_NAMES = {  # further names of a series
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
    "prefix_cache_queries": "gpu_prefix_cache_queries",
    "prefix_cache_hits": "gpu_prefix_cache_hits",
    "inter_token_latency_seconds": "time_per_output_token_seconds",
}
NAMES = (
    "num_requests_running",
    "num_requests_waiting",
    "cache_config_info",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "num_preemptions",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "time_to_first_token_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    *OLD_NAMES,
)


class VllmNames:
    """A collector beside that of `metrics`, for the same registry."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """The series of `NAMES` with their values; the registry calls this."""
        for family in self._metrics.collect():
            name = family.name.removeprefix(PREFIX)
            if name in NAMES:
                for other in vllm_names(name):
                    yield _renamed(family, VLLM_PREFIX + other)


def vllm_names(name: str) -> Iterable[str]:
    """vLLM's names of one of `NAMES`, without prefixes."""
    return (name, OLD_NAMES[name]) if name in OLD_NAMES else (name,)


def _renamed(family: Metric, name: str) -> Metric:
    """The family under another name, its samples summed over expert counts."""
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in family.samples:
        labels = tuple(item for item in sample.labels.items() if item[0] not in COUNT_LABEL)
        key = (sample.name.removeprefix(family.name), labels)
        sums[key] = sums.get(key, 0.0) + sample.value
    renamed = Metric(name, family.documentation, family.type)
    for (suffix, labels), value in sums.items():
        renamed.add_sample(name + suffix, dict(labels), value)
    return renamed


def vllm_table() -> str:
    """All names as a markdown table, for the docs."""
    rows = ["| series | kind | labels | the server's own |", "|---|---|---|---|"]
    for series in SERIES:
        if series.name not in NAMES:
            continue
        suffix = "_total" if series.kind == "counter" else ""
        own = [label for label in series.labels if label not in COUNT_LABEL]
        labels = ", ".join(f"`{label}`" for label in ("model_name", "engine", *own))
        names = ", ".join(f"`{VLLM_PREFIX}{name}{suffix}`" for name in vllm_names(series.name))
        rows.append(f"| {names} | {series.kind} | {labels} | `{PREFIX}{series.name}{suffix}` |")
    return "\n".join(rows) + "\n"
