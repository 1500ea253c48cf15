"""A storm at the start and the end of a server: requests before it is ready and while it drains, and starts that fail.

`python -m tests.storms.lifecycle [CASE …]` prints a line per case and one line of JSON.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.live import serving
from tests.storms.base import COMPLETIONS

BODY = {"prompt": "Once upon a time", "max_tokens": 60, "temperature": 0, "num_experts": 2}
CLIENTS = 12
SECONDS = 60  # for a server to begin or to end
COMMAND = str(Path(sys.executable).with_name("moedial"))


def a_whole_life() -> dict[str, Any]:
    """Requests from before the server listens until it has ended: each is answered, refused or ends with an error."""
    port = _free_port()
    process = subprocess.Popen([COMMAND, "serve", "--port", str(port), "--log-level", "error"], stdout=subprocess.PIPE)
    try:
        ends, exit_code = asyncio.run(_around(process, f"http://127.0.0.1:{port}"))
    finally:
        process.kill()
        process.wait()
    return {"ends": dict(ends), "exit": exit_code, "ok": exit_code == 0 and not ends["lost"] and ends["answered"] > 0}


async def _around(process: "subprocess.Popen[bytes]", url: str) -> tuple[Counter[str], int]:
    ends: Counter[str] = Counter()
    async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as client:
        clients = [asyncio.create_task(_client(client, ends, number % 2 == 0)) for number in range(CLIENTS)]
        deadline = time.monotonic() + SECONDS
        while ends["answered"] < 3 * CLIENTS and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait, SECONDS)
        await asyncio.sleep(0.5)
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    return ends, code


async def _client(client: httpx.AsyncClient, ends: Counter[str], streams: bool) -> None:
    while True:
        ends[await _ask(client, streams)] += 1
        await asyncio.sleep(0.05)


async def _ask(client: httpx.AsyncClient, streams: bool) -> str:
    """A server that closes an idle connection may do so just as a request is sent on it: no byte of an answer comes."""
    answer = None
    try:
        async with client.stream("POST", COMPLETIONS, json=BODY | {"stream": streams}) as answer:
            await answer.aread()
    except httpx.HTTPError:
        return "not listening" if answer is None else "lost"
    return _end(answer)


def _end(answer: httpx.Response) -> str:
    if answer.status_code == 200:
        whole = "choices" in answer.text and ("[DONE]" in answer.text or answer.text.endswith("}"))
        return "failed" if "event: error" in answer.text else "answered" if whole else "lost"
    return "refused" if "error" in answer.json() else "lost"


def port_in_use() -> dict[str, Any]:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        return _refused("--port", str(taken.getsockname()[1]))


def unknown_host() -> dict[str, Any]:
    return _refused("--host", "203.0.113.7")


def log_on_a_full_disk() -> dict[str, Any]:
    """Answers go on; lines are lost."""
    with open("/dev/full", "w") as full:
        return _serves(stderr=full)


def no_standard_streams() -> dict[str, Any]:
    port = _free_port()
    shell = f"exec {COMMAND} serve --port {port} <&- >&- 2>&-"
    return _answers(subprocess.Popen(["sh", "-c", shell]), port)


def log_that_is_not_read() -> dict[str, Any]:
    """A pipe that fills up."""
    read, write = os.pipe()
    try:
        return _serves(stderr=write, requests=400)
    finally:
        os.close(read)
        os.close(write)


def read_only_folder() -> dict[str, Any]:
    """Nothing is written where the server is started."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o500)
        return _serves(cwd=folder)


def two_servers_on_one_model() -> dict[str, Any]:
    with serving("--log-level", "error", watched=False) as one, serving("--log-level", "error", watched=False) as other:
        texts = [httpx.post(live.url + COMPLETIONS, json=BODY).json()["choices"][0]["text"] for live in (one, other)]
    return {"ok": texts[0] == texts[1]}


def _refused(*flags: str) -> dict[str, Any]:
    """Whether a start fails quickly, with one sentence."""
    started = time.monotonic()
    done = subprocess.run([COMMAND, "serve", *flags], capture_output=True, text=True, timeout=SECONDS)
    lines = done.stderr.strip().splitlines()
    return {"exit": done.returncode, "said": lines, "ok": done.returncode != 0 and len(lines) == 1} | {
        "seconds": round(time.monotonic() - started, 1)
    }


def _serves(requests: int = 5, **streams: Any) -> dict[str, Any]:
    port = _free_port()
    command = [COMMAND, "serve", "--port", str(port), "--log-level", "debug"]
    return _answers(subprocess.Popen(command, **streams), port, requests)


def _answers(process: "subprocess.Popen[Any]", port: int, requests: int = 5) -> dict[str, Any]:
    """Whether a server gets ready, answers `requests` times, and exits with 0."""
    url, answered = f"http://127.0.0.1:{port}", 0
    try:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.2)
        with suppress(httpx.HTTPError):
            for _ in range(requests):
                answered += httpx.post(url + COMPLETIONS, json=BODY | {"max_tokens": 2}).status_code == 200
        process.send_signal(signal.SIGTERM)
        code = process.wait(SECONDS)
    finally:
        process.kill()
        process.wait()
    return {"answered": answered, "exit": code, "ok": answered == requests and code == 0}


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


CASES: tuple[Callable[[], dict[str, Any]], ...] = (
    a_whole_life,
    port_in_use,
    unknown_host,
    log_on_a_full_disk,
    no_standard_streams,
    log_that_is_not_read,
    read_only_folder,
    two_servers_on_one_model,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    chosen = parser.parse_args().cases
    found = {case.__name__: case() for case in CASES if not chosen or case.__name__ in chosen}
    for name, result in found.items():
        print(f"{'ok ' if result['ok'] else 'BAD'} {name.replace('_', ' ')}: {result}")
    print(json.dumps(found))
    return int(not all(result["ok"] for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
