"""HAProxy with the configuration of `deploy/haproxy`, before servers of a test. It knows no test and no server."""

import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.deploy.manifests import DEPLOY

CONFIG = DEPLOY / "haproxy" / "haproxy.cfg"


@contextmanager
def proxied(lanes: Mapping[str, Sequence[str]]) -> Iterator[httpx.Client]:
    """A client of HAProxy, started on a free port before the addresses (HOST:PORT) of each lane."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "haproxy.cfg"
        file.write_text(configuration(port, lanes))
        process = subprocess.Popen(("haproxy", "-f", str(file)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                deadline = time.monotonic() + 10
                while not _answers(client):
                    assert process.poll() is None and time.monotonic() < deadline, "HAProxy does not answer"
                    time.sleep(0.05)
                yield client
        finally:
            process.terminate()
            process.wait(10)


def configuration(port: int, lanes: Mapping[str, Sequence[str]]) -> str:
    """The file of `deploy/`, with servers by address in place of those that it finds by name."""
    text = CONFIG.read_text().replace("bind :8001", f"bind 127.0.0.1:{port}")
    text = text.replace(" resolvers names init-addr none", "")
    for lane in ("low", "full"):
        template = f"server-template {lane} 8 moedial-{lane}:8000"
        assert template in text
        lines = [f"server {lane}-{number} {address}" for number, address in enumerate(lanes.get(lane, ()), 1)]
        text = text.replace(template, "\n    ".join(lines))
    return text


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/").status_code == 200
    except httpx.TransportError:
        return False
