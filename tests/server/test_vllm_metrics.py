"""Under vLLM's names are the server's own values, summed over expert counts, and only where a setting asks for them."""

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import SERIES
from server.vllm_metrics import NAMES
from tests.server.harness import COMPLETIONS, in_memory, service_of, value

GATEWAYS = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc")


def families_of(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_values_are_the_servers_own_summed_over_counts() -> None:
    with in_memory(metrics_compat="vllm") as client:
        for count in (1, 2, 2):
            client.post(COMPLETIONS, json={"prompt": "hi", "max_tokens": 4, "num_experts": count})
        found, service = families_of(client.get("/metrics").text), service_of(client)
    for name in GATEWAYS:
        [gauge] = found[f"vllm:{name}"].samples
        assert gauge.labels == {"model_name": "tiny", "engine": "0"}
    [tokens] = found["vllm:generation_tokens"].samples
    assert (tokens.name, tokens.value) == ("vllm:generation_tokens_total", 12.0)
    samples = found["vllm:time_to_first_token_seconds"].samples
    assert {sample.name: sample.value for sample in samples}["vllm:time_to_first_token_seconds_count"] == 3
    buckets = [sample.value for sample in samples if sample.name.endswith("_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == 3
    [info] = found["vllm:cache_config_info"].samples
    assert info.labels["block_size"] == "16" and info.labels["num_gpu_blocks"] == "100"
    assert found["vllm:request_prompt_tokens"].type == "histogram"
    assert value(service, "request_prompt_tokens_sum") == 6 and value(service, "request_generation_tokens_sum") == 12


def test_there_are_none_without_the_setting() -> None:
    with in_memory() as client:
        assert "vllm" not in client.get("/metrics").text


def test_every_name_is_one_of_the_servers_series() -> None:
    assert set(NAMES) <= {series.name for series in SERIES}
