"""A real `moedial serve` process on a free loopback port, as a context manager. It knows no test."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from tests.freezes import watch_server

READY_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Live:
    """A running server."""

    url: str
    process: subprocess.Popen[str]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of a series that carry these labels; 0 when there is none."""
        text = httpx.get(f"{self.url}/metrics").text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return sum(s.value for s in samples if s.name == f"moedial:{name}" and labels.items() <= s.labels.items())

    def settles(self, name: str, value: float, seconds: float = 20) -> bool:
        """Whether a gauge reaches a value in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.metric(name) == value:
                return True
            time.sleep(0.05)
        return False


@contextmanager
def serving(*flags: str, watched: bool = True) -> Iterator[Live]:
    """Start a server, wait for its ready line, stop it with SIGTERM. A test fails when the server stalled meanwhile
    or took too much memory (`tests/freezes.py`), unless it is not `watched`."""
    moedial = str(Path(sys.executable).with_name("moedial"))
    command = [moedial, "serve", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        live = Live(ready_url(process), process)
        host, _, port = live.url.removeprefix("http://").rpartition(":")
        with watch_server(host, int(port), process.pid) as watch:
            yield live
        if watched:
            watch.check()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def ready_url(process: subprocess.Popen[str], seconds: float = READY_SECONDS) -> str:
    """The address that the ready text names; fails where the server ends before it."""
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    for line in process.stdout:
        if match := re.search(r"curl (http://[\d.:]+)/", line):
            return match[1]
        assert time.monotonic() < deadline, "no ready line"
    raise AssertionError(f"the server ended with code {process.wait()} before it was ready")
