"""What still runs when the server stops waiting for it: each request ends with its one error, without a traceback."""

import json
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable

import httpx
import pytest

from tests.server.harness import eventually, frames

NAMES = ("stream", *"123456")
# One token of each answer comes, no further one ever does.
SERVE = textwrap.dedent("""
    import asyncio, sys
    import server.serve as serve
    from server.app import create_app
    from server.settings import Settings
    from tests.server.fakes import FakeEngine, FakeTokenizer, says
    from tests.server.harness import CARD

    serve.logs.configure("info")
    engine = FakeEngine(says("x" * 200))
    engine.gate, engine.free = asyncio.Event(), 1
    settings = Settings(model="tiny", port=0, drain_seconds=float(sys.argv[1]), max_running=1)
    app = create_app(settings, engine, FakeTokenizer(), None, CARD)
    serve.ModelServer(serve.config_of(settings, app), app.state.service).run()
""")


def half_sent(url: str) -> Callable[[], bytes]:
    """Sends the beginning of a request; called, it gives the whole answer."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection.sendall(head + b"content-length: 100\r\n\r\n{")

    def answer() -> bytes:
        with connection:
            return b"".join(iter(lambda: connection.recv(4096), b""))

    return answer


@pytest.mark.parametrize(("drain", "signals"), [(0.5, 1), (60, 2)])
def test_what_outlives_the_drain_ends_with_its_one_error(drain: float, signals: int) -> None:
    command = [sys.executable, "-c", SERVE, str(drain)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        process.stdout.readline()
        url = process.stdout.readline().split("curl ")[1].split("/v1/")[0]
        answers: dict[str, httpx.Response] = {}

        def send(name: str, stream: bool) -> None:
            body = {"prompt": "hi", "stream": stream}
            answers[name] = httpx.post(f"{url}/v1/completions", json=body, timeout=30)

        threads = [threading.Thread(target=send, args=(name, name == "stream")) for name in NAMES]
        for thread in threads:
            thread.start()
            time.sleep(0.05)  # the stream comes first
        answer = half_sent(url)
        eventually(lambda: waiting(httpx.get(f"{url}/metrics").text) >= 1)
        time.sleep(0.2)  # the first tokens
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        if signals == 2:
            eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
            process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(20)
        assert process.wait(20) == 0 and time.monotonic() - began < 6
        errors = process.stderr.read()
    finally:
        process.kill()
        process.communicate()
    stream = answers.pop("stream")
    assert stream.status_code == 200 and "event: error" in stream.text and "[DONE]" not in stream.text
    assert json.loads(frames(stream.text)[-1])["error"]["code"] == "server_stopped"
    for whole in answers.values():
        assert whole.status_code == 503 and whole.json()["error"]["type"] == "unavailable_error"
    assert answer().startswith(b"HTTP/1.1 503 ")
    assert "Traceback" not in errors and "cut off" in errors


def waiting(metrics: str) -> float:
    return next(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("moedial:num_requests_wai"))
