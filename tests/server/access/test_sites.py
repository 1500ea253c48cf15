"""Web pages and other sites: Host, Origin, CORS; and HEAD, HTTPS, status counts, connections that stay open."""

import socket
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from server.access.sites import hosts_of
from server.http.listening import BadCertificate, check_certificate
from server.settings import Settings
from tests.server.fakes import FakeEngine
from tests.server.harness import CHAT, COMPLETIONS, in_memory, on_loopback, service_of, value

CERTIFICATE = Path(__file__).parent / "localhost.pem"
EVIL = {"origin": "https://evil.example"}
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}


def asked(client: TestClient, **headers: str) -> httpx.Response:
    return client.post(COMPLETIONS, json={"prompt": "hi"}, headers={k.replace("_", "-"): v for k, v in headers.items()})


def code(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return str(error["code"])


LOCAL = ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "a.localhost", "box", "192.168.1.7", "box.local.")
FOREIGN = ("evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example", "evil.example.", "1.2.3.4.5")


def test_without_keys_a_local_server_answers_to_local_names_only() -> None:
    """A page whose name is made to resolve to this machine has that name in the Host header."""
    with in_memory() as client:
        for host in LOCAL:
            assert asked(client, host=host).status_code == 200, host
        for host in FOREIGN:
            refused = asked(client, host=host)
            assert refused.status_code == 403 and code(refused) == "host_not_allowed", host
            assert "--allowed-hosts" in refused.json()["error"]["message"]
            assert client.get("/v1/models", headers={"host": host}).status_code == 403
        assert value(service_of(client), "requests_rejected_total", reason="host_not_allowed") == len(FOREIGN)


@pytest.mark.parametrize(
    ("settings", "taken", "refused"),
    [
        ({"host": "0.0.0.0"}, ("llm.example.com", "localhost"), ()),
        ({"host": "0.0.0.0", "allowed_hosts": "llm.example.com"}, ("LLM.example.com:80", "10.0.0.1"), FOREIGN),
        ({"api_keys": ("k",)}, ("llm.example.com",), ()),
        ({"api_keys": ("k",), "allowed_hosts": "*.example.com"}, ("a.b.example.com",), ("example.com", "evil.example")),
        ({"allowed_hosts": "*"}, FOREIGN, ()),
        ({"host": "::1"}, LOCAL, FOREIGN),
        ({"host": "localhost"}, LOCAL, FOREIGN),
    ],
)
def test_which_names_are_answered(settings: dict[str, Any], taken: tuple[str, ...], refused: tuple[str, ...]) -> None:
    with in_memory(**settings) as client:
        for hosts, status in ((taken, 200), (refused, 403)):
            for host in hosts:
                assert client.get("/version", headers={"host": host}).status_code == status, host


def test_the_operators_own_name_of_the_address_is_answered() -> None:
    assert hosts_of((), "llm.home.example", False).allow("llm.home.example")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:3000", "http://testserver.evil.example"]
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/v1/models"])
def test_pages_of_other_sites_are_refused(origin: str, path: str) -> None:
    with in_memory() as client:
        method = "GET" if path == "/v1/models" else "POST"
        refused = client.request(method, path, json={"prompt": "hi"}, headers={"origin": origin})
        assert refused.status_code == 403 and code(refused) == "origin_not_allowed"
        assert "--allow-origin" in refused.json()["error"]["message"]
        assert "access-control-allow-origin" not in refused.headers


def test_a_servers_own_pages_may_ask_it_by_local_names_only() -> None:
    with in_memory(host="0.0.0.0") as client:
        assert asked(client, origin="http://testserver").status_code == 200
        assert asked(client, origin="http://localhost:8000", host="localhost:8000").status_code == 200
        rebound = asked(client, origin="http://evil.example:8000", host="evil.example:8000")
        assert rebound.status_code == 403 and code(rebound) == "origin_not_allowed"
    with in_memory(host="0.0.0.0", allowed_hosts="llm.example.com") as client:
        assert asked(client, origin="https://llm.example.com", host="llm.example.com").status_code == 200


def test_a_body_of_a_page_needs_its_content_type() -> None:
    """A page may send one without asking the browser first, and no type is read as JSON everywhere else."""
    with in_memory(allow_origin="https://ui.example") as client:
        body = b'{"prompt": "hi"}'
        for origin in ("http://testserver", "https://ui.example"):
            untyped = client.post(COMPLETIONS, content=body, headers={"origin": origin})
            assert untyped.status_code == 400 and untyped.json()["error"]["param"] == "content-type"
            typed = client.post(COMPLETIONS, content=body, headers={"origin": origin, "content-type": "text/plain"})
            assert typed.status_code == 400
        assert client.post(COMPLETIONS, content=body).status_code == 200


def test_keys_are_enough_of_a_guard_for_pages_that_have_one() -> None:
    with in_memory(api_keys=("k",)) as client:
        assert asked(client, **EVIL).status_code == 401
        assert asked(client, **EVIL, authorization="Bearer k").status_code == 200


@pytest.mark.parametrize("keys", [(), ("k",)])
def test_cors_is_off_by_default_and_answers_the_sites_that_are_allowed(keys: tuple[str, ...]) -> None:
    site = "https://ui.example"
    key = {"authorization": "Bearer k"}
    with in_memory(api_keys=keys) as client:
        assert client.options(COMPLETIONS, headers={"origin": site, **PREFLIGHT}).status_code == 403
        assert "access-control-allow-origin" not in client.get("/v1/models", headers=key).headers
    with in_memory(api_keys=keys, allow_origin=f"{site}, http://localhost:3000") as client:
        preflight = client.options(COMPLETIONS, headers={"origin": site, **PREFLIGHT})
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == site
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        assert "POST" in preflight.headers["access-control-allow-methods"]
        answer = asked(client, origin=site, **key)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == site
        exposed = answer.headers["access-control-expose-headers"]
        assert "x-num-experts" in exposed and "x-ratelimit-remaining-tokens" in exposed
        wrong = client.post(COMPLETIONS, json={"prompt": 1}, headers={"origin": site, **key})
        assert wrong.status_code == 400 and wrong.headers["access-control-allow-origin"] == site, "errors can be read"
        foreign = client.options(COMPLETIONS, headers={**EVIL, **PREFLIGHT})
        assert foreign.status_code == 403 and code(foreign) == "origin_not_allowed"
    with in_memory(api_keys=keys, allow_origin="*") as client:
        assert asked(client, **EVIL, **key).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["ui.example", "https://ui.example/", "https://UI.example", "https://a b"])
def test_what_is_no_origin_is_refused_at_start(origin: str) -> None:
    with pytest.raises(ValidationError, match="scheme://host"):
        Settings(allow_origin=origin)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["/live", "/health", "/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json"])
def test_head_is_get_without_a_body(path: str) -> None:
    with on_loopback(FakeEngine()) as (url, _):
        head, get = httpx.head(url + path), httpx.get(url + path)
        assert (head.status_code, head.content) == (200, b"")
        if path != "/metrics":
            assert head.headers["content-length"] == str(len(get.content))
        assert httpx.head(url + COMPLETIONS).status_code == 405


def test_answers_are_counted_by_route_method_and_status() -> None:
    with in_memory(api_keys=("k",)) as client:
        client.headers["authorization"] = "Bearer k"
        asked(client)
        client.post(COMPLETIONS, json={"prompt": "hi", "stream": True})
        client.post(COMPLETIONS, json={"prompt": 1})
        for path in ("tiny", "nothing", "a/b"):
            client.get(f"/v1/models/{path}")
        client.head("/v1/models/tiny")
        client.get("/wp-login.php")
        client.request("BREW", "/coffee")
        client.post(COMPLETIONS, headers={"authorization": "Bearer wrong"})
        service = service_of(client)
    expected = {
        (COMPLETIONS, "POST", "200"): 2,
        (COMPLETIONS, "POST", "400"): 1,
        (COMPLETIONS, "POST", "401"): 1,
        ("/v1/models/{model_id:path}", "GET", "200"): 1,
        ("/v1/models/{model_id:path}", "GET", "404"): 2,
        ("/v1/models/{model_id:path}", "HEAD", "200"): 1,
        ("other", "GET", "404"): 1,
        ("other", "other", "404"): 1,
    }
    for (route, method, status), count in expected.items():
        got = value(service, "http_requests_total", route=route, method=method, status=status)
        assert got == count, (route, method, status)
    watched = value(service, "http_requests_total", route="/health")
    assert value(service, "http_requests_total") - watched == sum(expected.values())


def test_a_fault_of_ours_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with in_memory() as client:
        service = service_of(client)
        monkeypatch.setattr(type(service), "tokenizer_info", property(lambda _: 1 / 0))
        # a traceback takes seconds to print
        monkeypatch.setattr("server.http.error_responses.log.error", lambda *_, **__: None)
        client._transport.raise_server_exceptions = False  # type: ignore[attr-defined]
        assert client.get("/tokenizer_info").status_code == 500
        assert value(service, "http_requests_total", route="/tokenizer_info", status="500") == 1


def test_an_idle_connection_stays_open_as_long_as_it_should() -> None:
    with on_loopback(FakeEngine(), keep_alive=0.3) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
            began, answer = time.monotonic(), b""
            while part := connection.recv(1000):
                answer += part
            assert answer.startswith(b"HTTP/1.1 200") and 0.2 < time.monotonic() - began < 10


def test_https_streams_like_http() -> None:
    trust = ssl.create_default_context(cafile=CERTIFICATE)
    with on_loopback(FakeEngine(), ssl_certfile=str(CERTIFICATE)) as (url, _):
        address = url.replace("http://127.0.0.1", "https://localhost")
        with httpx.Client(verify=trust) as client:
            body = {"prompt": "hi", "stream": True}
            assert client.post(address + COMPLETIONS, json=body).text.endswith("data: [DONE]\n\n")
            large = client.post(address + COMPLETIONS, content=b" " * 20_000_000)
            assert large.status_code == 413


@pytest.mark.parametrize(("certificate", "key"), [("nowhere.pem", ""), (__file__, ""), (str(CERTIFICATE), __file__)])
def test_a_certificate_that_cannot_be_used_is_one_sentence(certificate: str, key: str) -> None:
    with pytest.raises(BadCertificate, match="cannot be used"):
        check_certificate(certificate, key)
    check_certificate(str(CERTIFICATE), "")
    with pytest.raises(ValidationError, match="needs --ssl-certfile"):
        Settings(ssl_keyfile=__file__)


FRAME = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/metrics", "/v1/models"])
def test_what_another_sites_page_loads_is_refused_without_an_origin_too(path: str) -> None:
    """Pictures, scripts and frames have no Origin header; a link that is followed is a page of its own."""
    picture = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}
    link = {**FRAME, "sec-fetch-dest": "document"}
    with in_memory() as client:
        for refused in (picture, FRAME):
            answer = client.get(path, headers=refused)
            assert answer.status_code == 403 and code(answer) == "origin_not_allowed"
            assert "--allow-origin" in answer.json()["error"]["message"]
        assert client.post(COMPLETIONS, json={"prompt": "hi"}, headers=link).status_code == 403
        for taken in (link, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}):
            assert client.get(path, headers=taken).status_code == 200
    with in_memory(allow_origin="*") as client:
        assert client.get(path, headers=picture).status_code == 200
    with in_memory(api_keys=("k",)) as client:
        assert client.get(path, headers={**picture, "authorization": "Bearer k"}).status_code == 200
