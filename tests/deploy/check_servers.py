"""Two `moedial serve` behind HAProxy with the configuration of `deploy/haproxy`: `make test-scaling`.

It shows the added time per request (`pytest -s`), and asserts none.
"""

import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import httpx
import pytest

from tests.deploy.proxied import proxied
from tests.e2e.live import Live, serving

MODEL = "topk-stories"
FLAGS = ("--model", MODEL, "--threads", "1", "--kv-cache-bytes", str(64 << 20), "--log-level", "warning")
TIMED = 300  # requests each way
pytestmark = pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Live]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serving(*FLAGS, watched=False)) for _ in range(2)]


def ask(client: httpx.Client, prompt: str = "Once upon a time", **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", {})
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 0, **fields}
    return client.post("/v1/completions", json=body, headers=headers)


def address(server: Live) -> str:
    return server.url.removeprefix("http://")


def finished(servers: list[Live]) -> list[float]:
    return [server.metric("request_success_total") for server in servers]


def test_counts_reach_the_server_of_their_lane(servers: list[Live]) -> None:
    low, full = servers
    asked: list[tuple[dict[str, Any], int]] = [
        ({"num_experts": 1}, 1),
        ({"model": f"{MODEL}@k2"}, 2),
        ({"headers": {"X-Num-Experts": "2"}}, 2),
        ({"num_experts": 8}, 8),
        ({"model": f"{MODEL}@k8"}, 8),
        ({"headers": {"X-Num-Experts": "8"}}, 8),
        ({}, 4),
    ]
    with proxied({"low": [address(low)], "full": [address(full)]}) as proxy:
        for fields, count in asked:
            was = finished(servers)
            answer = ask(proxy, **fields)
            assert (answer.status_code, answer.headers["x-num-experts"]) == (200, str(count)), answer.text
            gained = [now - then for now, then in zip(finished(servers), was, strict=True)]
            assert gained == ([1, 0] if count <= 2 else [0, 1]), fields


def test_a_prompt_and_a_count_stay_on_the_server_that_caches_them(servers: list[Live]) -> None:
    """The second round finds in the cache what one server alone would."""
    prompts = [f"Story {number}. " + "Once upon a time there was a cat. " * 12 for number in range(6)]
    cached, full = [], []
    was = finished(servers)
    with proxied({"full": list(map(address, servers))}) as proxy:
        for _ in range(2):
            for count in (4, 8):
                usages = [ask(proxy, prompt, num_experts=count).json()["usage"] for prompt in prompts]
                cached.append(sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages))
                full.append(sum(usage["prompt_tokens"] for usage in usages))
    assert cached[0] == cached[1] == 0
    assert min(cached[2:]) >= 0.8 * full[0], (cached, full)
    assert all(now > then for now, then in zip(finished(servers), was, strict=True)), "one server got everything"


def test_a_stream_passes_event_by_event(servers: list[Live]) -> None:
    with proxied({"full": [address(servers[0])]}) as proxy:
        body = {"prompt": "Once", "max_tokens": 96, "stream": True, "ignore_eos": True}
        with proxy.stream("POST", "/v1/completions", json=body) as answer:
            pieces = [piece for piece in answer.iter_raw() if b"data:" in piece]
    assert len(pieces) > 3 and pieces[-1].endswith(b"data: [DONE]\n\n")


def test_time_per_request(servers: list[Live], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a short answer, with a body that HAProxy reads; each way in turn, so that a busy machine slows both alike."""
    body = {"prompt": "Once upon a time"}
    with proxied({"full": [address(servers[0])]}) as proxy, httpx.Client(base_url=servers[0].url, timeout=60) as direct:
        times: dict[str, list[float]] = {"direct": [], "through HAProxy": []}
        for _ in range(TIMED):
            for name, client in (("direct", direct), ("through HAProxy", proxy)):
                began = time.perf_counter()
                assert client.post("/tokenize", json=body).status_code == 200
                times[name].append(1e3 * (time.perf_counter() - began))
    with capsys.disabled():
        for name, taken in times.items():
            tenth = statistics.quantiles(taken, n=10)[0]  # what a busy machine changes least
            print(f"\n{name}: median {statistics.median(taken):.2f} ms, fastest tenth {tenth:.2f} ms", end="")
    assert all(len(taken) == TIMED for taken in times.values())


def test_requests_of_a_killed_server_go_to_the_other(servers: list[Live]) -> None:
    """The stream of the killed server breaks off; the other server's stream and every later request are whole.

    It comes last, as it leaves one server.
    """
    with proxied({"full": list(map(address, servers))}) as proxy:
        prompts = [f"Story {number}" for number in range(16)]
        owners = [owner(proxy, prompt, servers) for prompt in prompts]
        assert set(owners) == {0, 1}
        with stream(proxy, prompts[owners.index(0)]) as broken, stream(proxy, prompts[owners.index(1)]) as whole:
            lines = broken.iter_lines()
            next(lines)
            kill(servers[0])
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
            assert list(whole.iter_lines())[-2] == "data: [DONE]"
        assert all(ask(proxy, prompt).status_code == 200 for prompt in prompts)


def owner(proxy: httpx.Client, prompt: str, servers: list[Live]) -> int:
    """The number of the server that answers a prompt."""
    was = finished(servers)
    assert ask(proxy, prompt, num_experts=4).status_code == 200
    return [now - then for now, then in zip(finished(servers), was, strict=True)].index(1)


def stream(proxy: httpx.Client, prompt: str) -> AbstractContextManager[httpx.Response]:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": True, "num_experts": 4}
    return proxy.stream("POST", "/v1/completions", json=body)


def kill(server: Live) -> None:
    server.process.kill()
    server.process.wait()
