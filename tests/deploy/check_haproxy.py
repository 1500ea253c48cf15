"""HAProxy with the configuration of `deploy/haproxy`, before three servers that say their names: `make test-deploy`."""

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.deploy.proxied import proxied

SERVERS = {"low-1": "low", "full-1": "full", "full-2": "full"}
pytestmark = pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")


def named(name: str) -> ThreadingHTTPServer:
    """A server on a free port that answers every request with its name."""

    class Named(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(name)))
            self.end_headers()
            self.wfile.write(name.encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Named)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, ThreadingHTTPServer]]:
    running = {name: named(name) for name in SERVERS}
    yield running
    for server in running.values():
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def proxy(servers: dict[str, ThreadingHTTPServer]) -> Iterator[httpx.Client]:
    lanes: dict[str, list[str]] = {}
    for name, lane in SERVERS.items():
        lanes.setdefault(lane, []).append(f"127.0.0.1:{servers[name].server_port}")
    with proxied(lanes) as client:
        yield client


def lane(proxy: httpx.Client, body: dict[str, Any], **headers: str) -> str:
    return SERVERS[proxy.post("/v1/chat/completions", json=body, headers=headers).text]


def chat(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def test_a_low_count_has_a_lane_of_its_own_wherever_it_is_named(proxy: httpx.Client) -> None:
    assert lane(proxy, chat(num_experts=2)) == "low" and lane(proxy, chat(num_experts=3)) == "full"
    assert lane(proxy, chat(model="m@k1")) == "low" and lane(proxy, chat(model="m@k8")) == "full"
    assert lane(proxy, chat(model="m:k1")) == "low" and lane(proxy, chat(options={"num_experts": 1})) == "low"
    assert lane(proxy, chat(), **{"X-Num-Experts": "1"}) == "low"
    assert lane(proxy, chat()) == "full" and lane(proxy, {"prompt": "hi"}) == "full"
    assert lane(proxy, chat("x" * 40_000, num_experts=1)) == "low"


def test_prompts_that_begin_alike_go_to_one_server(proxy: httpx.Client) -> None:
    def server(text: str, count: int) -> str:
        return proxy.post("/v1/chat/completions", json=chat(text, num_experts=count)).text

    found: dict[tuple[int, int], set[str]] = {}
    for turn in range(3):
        for prompt in range(12):
            for count in (4, 8):
                text = f"prompt {prompt} ".ljust(300) + f"turn {turn}"
                found.setdefault((prompt, count), set()).add(server(text, count))
    assert all(len(names) == 1 for names in found.values())
    assert set.union(*found.values()) == {"full-1", "full-2"}


def test_what_is_not_json_reaches_a_server(proxy: httpx.Client) -> None:
    assert proxy.get("/v1/models").text in SERVERS
    assert proxy.post("/v1/completions", content=b"{").text in SERVERS
