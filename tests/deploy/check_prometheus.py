"""Every expression of the board and the rules, asked of a real Prometheus that scrapes a loaded server.

`make test-operators`; it needs Debian's package `prometheus`, which has promtool as well.
"""

import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.expressions import RULES, rules
from tests.deploy.test_monitoring import TARGETS
from tests.e2e.live import Live, serving

VARIABLES = {"$job": ".*", "$instance": ".*", "$model_name": ".*", "$num_experts": ".*", "$__rate_interval": "5m"}
CALLS = 6  # of each count
SEEN_SECONDS = 120


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(
        "--brownout", "--max-running", "4", "--threads", "1", "--metrics-compat", "vllm", watched=False
    ) as live:
        yield live


@pytest.fixture(scope="module")
def prometheus(live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that has scraped the server under load."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load(RULES.with_name("prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    job = config["scrape_configs"][0]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [live.url.removeprefix("http://")]}]
    config["rule_files"] = [str(RULES)]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    options = (f"--config.file={file}", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(("prometheus", *options), stdout=log, stderr=log)
        try:
            url = f"http://{address}"
            seen(url, "moedial:engine_up")
            load(live)
            done = live.metric("request_success_total")
            seen(url, f"sum(moedial:request_success_total) == {done}")
            seen(url, "moedial:pairs_saved:ratio_5m > 0")
            yield url
        finally:
            process.terminate()
            process.wait(20)


def load(live: Live) -> None:
    """Ask at several counts at once, also what is refused."""

    def ask(count: int) -> None:
        with httpx.Client(base_url=live.url, timeout=120) as client:
            for _ in range(CALLS):
                body = {"prompt": "Once upon a time", "max_tokens": 24, "num_experts": count, "n": 2}
                client.post("/v1/completions", json=body)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, (1, 2, 8, 99)))


def seen(prometheus: str, expression: str) -> None:
    """Wait until an expression finds something."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not (answers(prometheus) and asked(prometheus, expression)):
        assert time.monotonic() < deadline, f"Prometheus never saw {expression}"
        time.sleep(0.5)


def answers(prometheus: str) -> bool:
    try:
        return httpx.get(f"{prometheus}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def asked(prometheus: str, expression: str) -> list[Any]:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", f"{answer}: {expression}"
    result = answer["data"]["result"]
    return result if isinstance(result, list) else [result]


@pytest.mark.timeout(600)
def test_every_query_of_the_board_finds_something(prometheus: str) -> None:
    empty = [(title, expression) for title, expression in TARGETS if not asked(prometheus, expression)]
    assert not empty


def test_every_recorded_series_is_there_and_every_alert_can_be_asked(prometheus: str) -> None:
    for rule in rules():
        found = asked(prometheus, rule["expr"])
        if "record" in rule:
            assert found and asked(prometheus, rule["record"]), rule["record"]
    answer = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    states = {rule["name"]: (rule["health"], rule.get("lastError")) for group in answer for rule in group["rules"]}
    assert len(states) == len(rules()) and {health for health, _ in states.values()} == {"ok"}, states


def test_what_a_low_count_saves_is_seen(prometheus: str) -> None:
    [saved] = asked(prometheus, "moedial:pairs_saved:ratio_5m")
    assert 0.05 < float(saved["value"][1]) < 0.9
    counts = {found["metric"]["num_experts"] for found in asked(prometheus, "moedial:itl_seconds:p95_5m")}
    assert {"1", "2", "8"} <= counts


def test_vllms_names_have_the_servers_values(prometheus: str) -> None:
    for name in ("num_requests_running", "kv_cache_usage_perc", "generation_tokens_total"):
        difference = f"sum(vllm:{name}) - sum(moedial:{name})"
        [found] = asked(prometheus, difference)
        assert float(found["value"][1]) == 0


@pytest.mark.parametrize("command", [("check", "rules"), ("test", "rules")])
def test_promtool_accepts_the_rules_and_their_tests_pass(command: tuple[str, ...]) -> None:
    file = "rules.yml" if command[0] == "check" else "rules_test.yml"
    done = subprocess.run(("promtool", *command, file), cwd=RULES.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_configuration() -> None:
    done = subprocess.run(("promtool", "check", "config", "prometheus.yml"), cwd=RULES.parent, capture_output=True)
    assert done.returncode == 0, done.stdout
