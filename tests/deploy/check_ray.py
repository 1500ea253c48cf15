"""Two replicas of `deploy/ray` in a Ray of their own on the loopback address: `make test-scaling`.

It shows the added time per request and per token beside one server alone (`pytest -s`), and asserts none.
"""

import os
import signal
import socket
import statistics
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

ray = pytest.importorskip("ray", reason="Ray is installed by `make test-scaling`")
from ray import serve  # noqa: E402

from deploy.ray.app import Arguments, build  # noqa: E402
from tests.clients.running import MODEL, serving  # noqa: E402

CACHE = 64 << 20
TIMED = 20  # calls of each length, each way
TOKENS = 65
READY_SECONDS = 120


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = {"kv_cache_bytes": CACHE, "drain_seconds": 20}
        serve.run(build(Arguments(model=MODEL, min_replicas=2, max_replicas=2, settings=settings)))
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def replicas(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def alone() -> Iterator[httpx.Client]:
    with (
        serving("--kv-cache-bytes", str(CACHE), "--log-level", "warning") as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def workers() -> list[psutil.Process]:
    """The engine processes of the replicas."""
    below = psutil.Process().children(recursive=True)
    engines = [process for process in below if "engine.process.worker" in process.cmdline()]
    return [engine for engine in engines if any("ray::" in above.name() for above in engine.parents())]


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", {})
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0, **fields}
    return client.post("/v1/completions", json=body, headers=headers)


def test_counts_pass_by_body_name_and_header(replicas: httpx.Client) -> None:
    for fields in ({"num_experts": 2}, {"model": f"{MODEL}@k2"}, {"headers": {"X-Num-Experts": "2"}}):
        answer = ask(replicas, **fields)
        assert (answer.status_code, answer.headers["x-num-experts"]) == (200, "2"), answer.text
    refused = ask(replicas, num_experts=99)
    assert refused.status_code == 400 and "num_experts" in refused.json()["error"]["message"]


def test_answers_are_those_of_the_server_alone(replicas: httpx.Client, alone: httpx.Client) -> None:
    for count in (1, 4, 8):
        texts = [ask(way, num_experts=count, max_tokens=24).json()["choices"][0] for way in (alone, replicas)]
        assert texts[0] == texts[1]


def test_a_stream_passes_event_by_event(replicas: httpx.Client) -> None:
    body = {"prompt": "Once", "max_tokens": 96, "stream": True, "ignore_eos": True}
    with replicas.stream("POST", "/v1/completions", json=body) as answer:
        pieces = [piece for piece in answer.iter_raw() if b"data:" in piece]
    assert len(pieces) > 3 and pieces[-1].endswith(b"data: [DONE]\n\n")


def test_time_per_request_and_per_token(
    replicas: httpx.Client, alone: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both ways in turn, so that a busy machine slows them alike."""
    ways = {"alone": alone, "through Ray": replicas}
    taken: dict[tuple[str, int], list[float]] = {(way, tokens): [] for way in ways for tokens in (1, TOKENS)}
    for _ in range(TIMED):
        for way, tokens in taken:
            taken[way, tokens].append(streamed(ways[way], tokens))
    with capsys.disabled():
        for way in ways:
            for name, of in (("median", statistics.median), ("fastest tenth", tenth)):
                one, all_of_them = (1e3 * of(taken[way, tokens]) for tokens in (1, TOKENS))
                further = (all_of_them - one) / (TOKENS - 1)
                print(f"\n{way}, {name}: one token {one:.1f} ms, each further token {further:.2f} ms", end="")
    assert all(len(times) == TIMED for times in taken.values())


def tenth(times: list[float]) -> float:
    """The time that the fastest tenth stays under: what a busy machine changes least."""
    return statistics.quantiles(times, n=10)[0]


def streamed(client: httpx.Client, tokens: int) -> float:
    """Seconds of a streamed answer."""
    body = {"prompt": "Once", "max_tokens": tokens, "stream": True, "ignore_eos": True, "num_experts": 1}
    began = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        answer.read()
    return time.perf_counter() - began


def test_a_killed_engine_is_started_again_and_the_other_replica_answers(replicas: httpx.Client) -> None:
    """The replica starts its engine itself; Ray need not replace it."""
    first, *others = workers()
    assert len(others) == 1
    os.kill(first.pid, signal.SIGKILL)
    answers = [ask(replicas) for _ in range(8)]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) < len(answers)
    assert {answer.json()["error"]["code"] for answer in refused} <= {"engine_down", "generation_failed"}
    deadline = time.monotonic() + READY_SECONDS
    while len(workers()) < 2 or any(ask(replicas).status_code != 200 for _ in range(8)):
        assert time.monotonic() < deadline, "the engine was not started again"
        time.sleep(0.5)


def test_replicas_that_are_taken_away_finish_their_answers_and_end_their_engines(replicas: httpx.Client) -> None:
    """It comes last, as it leaves none."""
    engines = workers()
    assert len(engines) == 2
    body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with replicas.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        serve.delete("default", _blocking=False)
        assert list(lines)[-2] == "data: [DONE]"
    assert not psutil.wait_procs(engines, timeout=READY_SECONDS)[1]
