"""Keys in requests: who is let in, what a key may use, and that no key is ever shown."""

import asyncio
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from server.access.keys import read_keys
from server.http.auth import RATE_LIMIT_HEADERS, credentials
from server.http.middleware import PROBES
from tests.server.fakes import FakeEngine, says
from tests.server.harness import CHAT, COMPLETIONS, eventually, in_memory, key_file, on_loopback, service_of, value

SECRET = "sk-very-secret-éà"
BODY = {"prompt": "hi", "max_tokens": 4}


def bearer(key: str | bytes) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + (key.encode() if isinstance(key, str) else key)}


def x_api_key(key: str) -> dict[bytes, bytes]:
    return {b"x-api-key": key.encode()}


@pytest.fixture
def two(tmp_path: Path) -> Iterator[str]:
    yield key_file(tmp_path, f'[alice]\nkey = "{SECRET}"\n[bob]\nkey = "sk-bob"\n')


# who is let in


@pytest.mark.parametrize("key", [SECRET, "sk-bob", "voil\u00e0", "\u2003inner\u2003", "x\u0085"])
def test_keys_are_compared_as_sent(tmp_path: Path, key: str) -> None:
    """à ends with the byte of a no-break space, which text knows as white space."""
    with in_memory(api_keys_file=key_file(tmp_path, f'[alice]\nkey = "{key}"')) as client:
        for headers in (
            bearer(key),
            x_api_key(key),
            bearer(key) | x_api_key(key),
            bearer(b" \t" + key.encode() + b" "),
        ):
            assert client.post(COMPLETIONS, json=BODY, headers=headers).status_code == 200
        for wrong in (key.encode()[:-1], key.encode() + b"\xa0", b"\xa0" + key.encode(), key.encode("utf-16"), b""):
            assert client.post(COMPLETIONS, json=BODY, headers=bearer(wrong)).status_code == 401


def test_keys_in_both_headers_must_agree(two: str) -> None:
    with in_memory(api_keys_file=two) as client:
        for headers in (bearer(SECRET) | x_api_key("sk-bob"), bearer("wrong") | x_api_key("sk-bob")):
            response = client.post(COMPLETIONS, json=BODY, headers=headers)
            assert response.status_code == 401 and "different keys" in response.json()["error"]["message"]
        basic = {b"authorization": b"Basic dXNlcjpwYXNz"} | x_api_key("sk-bob")
        assert client.post(COMPLETIONS, json=BODY, headers=basic).status_code == 200


def test_every_credential_of_a_request_is_seen() -> None:
    headers = [(b"authorization", b"BEARER  a "), (b"authorization", b"Bearer b"), (b"x-api-key", b"\tc"), (b"x", b"d")]
    assert credentials([*headers, (b"authorization", b"Basic e"), (b"authorization", b"Bearer")]) == [
        b"a",
        b"b",
        b"c",
        b"",
    ]


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch, two: str) -> None:
    import server.access.keys

    keys, compared = read_keys((), two), []
    real = server.access.keys.hmac.compare_digest
    monkeypatch.setattr(
        server.access.keys.hmac, "compare_digest", lambda a, b: compared.append(len(a) == len(b)) or real(a, b)
    )
    assert [keys.name_of(given) for given in (SECRET.encode(), b"sk-bob", b"x", b"")] == ["alice", "bob", None, None]
    assert compared == [True] * 8


# what a key may use


def test_requests_per_minute(tmp_path: Path) -> None:
    text = '[alice]\nkey = "a"\nrequests_per_minute = 2\n[bob]\nkey = "b"\n'
    with in_memory(api_keys_file=key_file(tmp_path, text)) as client:
        first, second, third = (client.post(COMPLETIONS, json=BODY, headers=bearer("a")) for _ in range(3))
        assert [answer.status_code for answer in (first, second, third)] == [200, 200, 429]
        assert [first.headers[f"x-ratelimit-{what}-requests"] for what in ("limit", "remaining")] == ["2", "1"]
        told = {name for name in first.headers if name.startswith("x-ratelimit")}
        assert told == {name for name in RATE_LIMIT_HEADERS if name.endswith("requests")}
        assert re.fullmatch(r"\d+\.\d{3}s", first.headers["x-ratelimit-reset-requests"])
        error = third.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "rate_limit_exceeded", None)
        assert "2 requests per minute" in error["message"] and 25 <= int(third.headers["retry-after"]) <= 30
        assert third.headers["x-ratelimit-remaining-requests"] == "0" and "x-should-retry" not in third.headers
        assert third.headers["connection"] == "close", "its body was not read"
        assert client.get("/v1/models", headers=bearer("a")).status_code == 200, "what is free is not limited"
        other = client.post(COMPLETIONS, json=BODY, headers=bearer("b"))
        assert other.status_code == 200 and not any(name.startswith("x-ratelimit") for name in other.headers)
        service = service_of(client)
        assert (
            value(service, "key_requests_total", key="alice") == 2
            and value(service, "key_requests_total", key="bob") == 1
        )
        assert value(service, "key_requests_limited_total", key="alice", limit="requests") == 1
        assert value(service, "requests_rejected_total", reason="rate_limit_exceeded") == 1


def test_a_refusal_before_the_body_arrives_as_such(tmp_path: Path) -> None:
    """A client that is still writing a large body reads the 429 or 401, not a broken connection."""
    file = key_file(tmp_path, '[alice]\nkey = "a"\nrequests_per_minute = 1\n')
    with on_loopback(FakeEngine(), api_keys_file=file) as (url, _), httpx.Client(base_url=url) as client:
        assert client.post(COMPLETIONS, json=BODY, headers=bearer("a")).status_code == 200
        for key, status in (("a", 429), ("wrong", 401)):
            answer = client.post(COMPLETIONS, json=BODY | {"prompt": "x" * 7_000_000}, headers=bearer(key))
            assert answer.status_code == status
        assert client.get("/v1/models", headers=bearer("a")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_per_minute_count_prompts_and_answers(tmp_path: Path, stream: bool) -> None:
    text = '[alice]\nkey = "a"\ntokens_per_minute = 10\n'
    with in_memory(FakeEngine(says("x" * 50)), api_keys_file=key_file(tmp_path, text)) as client:
        body = {"prompt": ["four", "four"], "max_tokens": 20, "n": 2, "stream": stream}
        answer = client.post(COMPLETIONS, json=body, headers=bearer("a"))
        assert answer.status_code == 200
        refused = client.post(COMPLETIONS, json=BODY, headers=bearer("a"))
        assert refused.status_code == 429 and "10 tokens per minute" in refused.json()["error"]["message"]
        # 8 of the prompts and 80 of the answers, of which 10 were there, and one more to go on
        assert abs(int(refused.headers["retry-after"]) - (88 - 10 + 1) * 6) <= 2
        service = service_of(client)
        assert value(service, "key_tokens_total", key="alice", kind="prompt") == 8
        assert value(service, "key_tokens_total", key="alice", kind="generation") == 80


def test_a_key_gets_its_share_of_the_places(tmp_path: Path) -> None:
    text = '[alice]\nkey = "a"\nshare_of_places = 0.25\n[bob]\nkey = "b"\n'
    engine = FakeEngine()
    engine.gate = asyncio.Event()
    settings = {"max_running": 4, "queue_size": 4, "max_queued_tokens": 40, "total_timeout": 10}
    file = key_file(tmp_path, text)
    with in_memory(engine, api_keys_file=file, **settings) as client, ThreadPoolExecutor(1) as threads:
        service = service_of(client)

        def post(key: str, n: int, prompt: str = "hi") -> httpx.Response:
            return client.post(COMPLETIONS, json=BODY | {"n": n, "prompt": prompt}, headers=bearer(key))

        never = post("a", 3)
        assert (
            never.status_code == 400
            and "3 sequences in all; this key may hold at most 2" in never.json()["error"]["message"]
        )
        long = post("a", 1, "x" * 11)
        assert long.status_code == 400 and "11 prompt tokens in all; this key may hold at most 10" in long.text
        running = threads.submit(post, "a", 1, "x" * 9)
        eventually(lambda: service.admission.tokens_by["alice"] == 9)
        more = post("a", 1)
        assert more.status_code == 429 and "holds 9 of at most 10 prompt tokens" in more.text
        client.portal.call(engine.gate.set)
        assert running.result().status_code == 200
        engine.gate.clear()
        running = threads.submit(post, "a", 2)
        eventually(lambda: service.admission.held_by["alice"] == 2)
        taken = post("a", 1)
        assert taken.status_code == 429 and taken.headers["retry-after"] == "1"
        error = taken.json()["error"]
        assert error["code"] == "rate_limit_exceeded" and "holds 2 of at most 2 sequences" in error["message"]
        assert value(service, "key_requests_limited_total", key="alice", limit="places") == 2
        client.portal.call(engine.gate.set)
        assert running.result().status_code == post("a", 2).status_code == post("b", 8).status_code == 200
        assert service.admission.held_by.total() == service.admission.tokens_by.total() == 0


@pytest.mark.parametrize(
    ("settings", "salted"),
    [({}, True), ({"prefix_sharing": "all"}, False), ({"prefix_sharing": "key"}, True), ({"one": True}, False)],
)
def test_prefixes_are_kept_apart_by_key(tmp_path: Path, settings: dict[str, Any], salted: bool) -> None:
    one = settings.pop("one", False)
    text = '[alice]\nkey = "a"\n' + ("" if one else '[bob]\nkey = "b"\n')
    engine = FakeEngine()
    with in_memory(engine, api_keys_file=key_file(tmp_path, text), **settings) as client:
        for key in ("a",) if one else ("a", "b"):
            for path, body in ((COMPLETIONS, BODY), (CHAT, {"messages": [{"role": "user", "content": "hi"}]})):
                assert client.post(path, json=body, headers=bearer(key)).status_code == 200
    assert [request.salt for request in engine.seen] == (
        ["alice"] * 2 + ["bob"] * 2 if salted else [""] * len(engine.seen)
    )


# nothing shows a key


@pytest.mark.slow
def test_no_key_is_ever_shown(two: str, caplog: pytest.LogCaptureFixture) -> None:
    """Good and wrong keys, in every header, on answers, refusals and faults: not in logs, answers or metrics."""
    wrong, engine = "sk-wrong-but-secret", FakeEngine()
    engine.fail_at = {"-1": (2, RuntimeError("a fault of the server's own"))}
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []
    bodies: list[Any] = [BODY, BODY | {"stream": True}, {"prompt": 7}, BODY | {"n": 2}, BODY | {"unknown": 1}]
    with (
        capture_logs() as logs,
        on_loopback(engine, api_keys_file=two) as (url, service),
        httpx.Client(base_url=url) as client,
    ):
        for key in (SECRET, wrong):
            for headers in (bearer(key), x_api_key(key), bearer(key) | x_api_key("sk-bob")):
                answers = [client.post(COMPLETIONS, json=body, headers=headers) for body in bodies]
                answers += [client.get(path, headers=headers) for path in ("/nothing", "/v1/models", "/openapi.json")]
                answers.append(client.post(CHAT, content=b"{", headers=headers))
                seen += [f"{answer.status_code} {answer.text} {answer.headers}" for answer in answers]
        seen.append(client.get("/metrics").text)
        assert value(service, "key_requests_total", key="alice") > 0
    assert any(answer.startswith("500") for answer in seen) and any("200" in answer for answer in seen)
    assert any(line.get("key") == "alice" for line in logs), "the name is what logs show"
    text = "\n".join([*map(str, logs), caplog.text, *seen, repr(service.settings), repr(service.keys.__dict__)])
    for key in (SECRET, wrong, "sk-bob"):
        for form in (key, key.encode("utf-8").decode("latin-1"), repr(key.encode())[2:-1], ascii(key)[1:-1]):
            assert form not in text


def test_every_route_is_guarded_but_the_probes(two: str) -> None:
    with in_memory(api_keys_file=two) as client:
        described = client.get("/openapi.json", headers=bearer("sk-bob")).json()
        routes = [(way, path) for path, item in described["paths"].items() for way in item]
        denied = {path for way, path in routes if client.request(way, path).status_code == 401}
        assert {path for _, path in routes} - denied == PROBES
        assert [client.get(path).status_code for path in ("/redoc", "/openapi.json", "/page/nothing")] == [401] * 3
    assert described["security"] == [{"key": []}, {"x-api-key": []}]
    assert {path for way, path in routes if described["paths"][path][way].get("security") == []} == PROBES
    with in_memory() as client:
        assert "security" not in client.get("/openapi.json").json()
