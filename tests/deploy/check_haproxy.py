"""HAProxy with the configuration of `deploy/haproxy`, before three servers that say their names: `make test-deploy`."""

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.manifests import DEPLOY

SERVERS = {"low-1": "low", "full-1": "full", "full-2": "full"}
CONFIG = DEPLOY / "haproxy" / "haproxy.cfg"
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
def proxy(servers: dict[str, ThreadingHTTPServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    text = CONFIG.read_text().replace("bind :8001", f"bind 127.0.0.1:{port}")
    text = text.replace(" resolvers names init-addr none", "")
    for lane in ("low", "full"):
        template = f"server-template {lane} 8 moedial-{lane}:8000"
        assert template in text
        lines = [f"server {name} 127.0.0.1:{servers[name].server_port}" for name in SERVERS if SERVERS[name] == lane]
        text = text.replace(template, "\n    ".join(lines))
    file: Path = tmp_path_factory.mktemp("haproxy") / "haproxy.cfg"
    file.write_text(text)
    process = subprocess.Popen(("haproxy", "-f", str(file)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            deadline = time.monotonic() + 10
            while not _answers(client):
                assert process.poll() is None and time.monotonic() < deadline, "HAProxy does not answer"
                time.sleep(0.05)
            yield client
    finally:
        process.terminate()
        process.wait(10)


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/").status_code == 200
    except httpx.TransportError:
        return False


def lane(proxy: httpx.Client, body: dict[str, Any], **headers: str) -> str:
    return SERVERS[proxy.post("/v1/chat/completions", json=body, headers=headers).text]


def chat(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def test_a_low_count_has_a_lane_of_its_own_wherever_it_is_named(proxy: httpx.Client) -> None:
    assert lane(proxy, chat(num_experts=2)) == "low" and lane(proxy, chat(num_experts=3)) == "full"
    assert lane(proxy, chat(model="m@k1")) == "low" and lane(proxy, chat(model="m@k8")) == "full"
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
