"""The clients of the brownout benchmark, and what it makes of their figures, on a server with a fake engine."""

import asyncio

import pytest

from benchmarks.brownout import OUTPUT, body, figures, table, watched
from benchmarks.open_loop import Sent, closed_loop, moments, open_loop, send
from tests.server.fakes import FakeEngine
from tests.server.harness import on_loopback

USAGE = {"completion_tokens": OUTPUT, "num_experts": 4}


def test_moments_come_at_the_rate_and_are_the_same_every_time() -> None:
    found = moments(50.0, 100.0)
    assert found == moments(50.0, 100.0) == sorted(found)
    assert found[0] >= 0 and found[-1] < 100.0 and len(found) == pytest.approx(5000, rel=0.1)


def test_streams_over_http_are_timed_and_their_ends_noted() -> None:
    engine = FakeEngine(lambda _: [97] * OUTPUT)
    with on_loopback(engine) as (url, _):
        port = int(url.rpartition(":")[2])
        opened = asyncio.run(open_loop(port, body, [0.0, 0.01, 0.02]))
        closed = asyncio.run(closed_loop(port, body, 2, 0.3))
        refused = asyncio.run(send(port, body(0) | {"num_experts": 99}))
        arm = asyncio.run(watched(port, open_loop(port, body, [0.0])))
    assert [len(one.tokens) for one in opened] == [OUTPUT] * 3 and all(one.finished for one in [*opened, *closed])
    assert len({request.prompt for request in engine.seen[:3]}) == 3 and len(closed) >= 2
    assert (refused.status, refused.finished, refused.tokens) == (400, False, [])
    assert (arm["answered"], arm["counts"], arm["sent"]) == (1.0, {"4": 1}, 1)
    unreached = asyncio.run(send(1, body(0)))
    assert unreached.status == 0 and not unreached.finished


def test_figures_are_over_all_that_was_sent() -> None:
    slow = Sent(0.0, 200, [1.0, 1.010, 1.030], True, USAGE)
    cut = Sent(0.0, 200, [2.0, 2.040], False)
    found = figures([slow, cut, Sent(0.0, 503), Sent(0.0, 0)], [0, 7, 3])
    assert (found["answered"], found["refused"]) == (0.25, 1)
    assert found["requests_per_second"] == pytest.approx(1 / 2.04)
    assert found["itl_p50_ms"] == pytest.approx(20.0) and found["itl_p95_ms"] == pytest.approx(38.0)
    assert (found["longest_queue"], found["first_token_p95_ms"]) == (7, 1000.0)
    rows = table({"unloaded": found, "twice": found | {"itl_p95_ms": 76.0, "rate": 1.5}}).splitlines()
    assert "76.0 (2.00 ×)" in rows[-1] and "1.50" in rows[-1] and "25%" in rows[-1]
