"""Sees whether a server stood still, and how much memory it took, while a test asked something of it.

A poller asks for /health again and again beside the requests of a test. An answer is a freeze when it comes late and
the server's process computed meanwhile: then something kept the interpreter or the event loop to itself. A late answer
without computing is a freeze as well, from two seconds on: something blocked. So a busy machine fails no test.

It knows /health and one process, no other request.
"""

import asyncio
import contextlib
import gc
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
from fastapi import FastAPI

PATH = "/health"
EVERY = 0.02  # seconds between two questions
LATE = 0.1  # seconds on an idle machine of the nominal speed
BLOCKED = 2.0  # seconds without computing
GROWTH = 256 << 20  # bytes that a server may take during one test
NOMINAL = 0.02  # CPU seconds of `_work` on the machine that LATE was chosen on
READ_MEMORY_EVERY = 5  # questions


def _work() -> float:
    """CPU seconds of a fixed piece of Python."""
    started = time.process_time()
    sum(number * number for number in range(400_000))
    return time.process_time() - started


# How many times slower than the nominal machine this one is, measured before any poller runs.
SLOWNESS = max(1.0, min(_work() for _ in range(5)) / NOMINAL)


@dataclass
class Watch:
    """What a poller saw of one process."""

    process: psutil.Process = field(default_factory=psutil.Process)
    worst: float = 0.0  # seconds late
    freezes: list[str] = field(default_factory=list)
    growth: int = 0  # bytes
    questions: int = 0
    _before: int = field(init=False)

    def __post_init__(self) -> None:
        self._before = self.memory()

    def memory(self) -> int:
        """Bytes of the process's own memory, without pages of files: the system takes those back at any time."""
        info = self.process.memory_info()
        return int(info.rss - info.shared)

    def cpu(self) -> float:
        """CPU seconds of the process so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def saw(self, late: float, computed: float) -> None:
        """Note one answer: seconds late, and CPU seconds of the process from question to answer."""
        self.worst = max(self.worst, late)
        self.questions += 1
        limit = LATE * SLOWNESS
        if (late > limit and computed > limit) or late > BLOCKED * SLOWNESS:
            self.freezes.append(f"{late:.2f} s late, with {computed:.2f} CPU seconds")
        if self.questions % READ_MEMORY_EVERY == 0:
            self.read_memory()

    def read_memory(self) -> None:
        """Note how much memory the process has."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.growth = max(self.growth, self.memory() - self._before)

    def check(self, growth: int = GROWTH) -> None:
        """Raise AssertionError where the server stood still or took more than `growth` bytes."""
        assert not self.freezes, f"{PATH} was answered late: {'; '.join(self.freezes[:4])}"
        assert self.growth <= growth, f"the process took {self.growth >> 20} MiB more; the limit is {growth >> 20}"


class InProcess(Watch):
    """Of a server in the test's own process, without what is the test's own: its thread, and looking for garbage among
    all that tests have made, which may fall to any thread."""

    def cpu(self) -> float:
        own = time.pthread_getcpuclockid(threading.main_thread().ident or 0)
        return time.process_time() - time.clock_gettime(own) - _collecting.seconds


@dataclass
class _Collecting:
    """CPU seconds that the collector of garbage took so far, outside of the main thread."""

    seconds: float = 0.0
    began: float = 0.0

    def __call__(self, phase: str, _: dict[str, int]) -> None:
        if threading.current_thread() is threading.main_thread():
            return
        if phase == "start":
            self.began = time.thread_time()
        else:
            self.seconds += time.thread_time() - self.began


_collecting = _Collecting()
gc.callbacks.append(_collecting)


def watch_app(app: FastAPI) -> Watch:
    """Poll an app from its own event loop for as long as it lives.

    What tests have loaded so far is kept out of the collector's way, as `ModelServer` does with what a server loads: a
    look through all of it takes 0.2 CPU seconds.
    """
    gc.freeze()
    watch, inner = InProcess(), app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(lived: FastAPI) -> AsyncIterator[Any]:
        async with inner(lived) as state:
            poller = asyncio.create_task(_poll_app(lived, watch))
            try:
                yield state
            finally:
                poller.cancel()
                await asyncio.gather(poller, return_exceptions=True)

    app.router.lifespan_context = lifespan
    app.state.watch = watch
    return watch


async def _poll_app(app: FastAPI, watch: Watch) -> None:
    while True:
        asked, computed = time.monotonic(), watch.cpu()
        await asyncio.sleep(EVERY)
        await _ask(app)
        watch.saw(time.monotonic() - asked - EVERY, watch.cpu() - computed)


async def _ask(app: FastAPI) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "root_path": "",
        "state": {},
    }
    await app(scope, receive, send)


@contextlib.contextmanager
def watch_server(host: str, port: int, pid: int) -> Iterator[Watch]:
    """Poll a server of another process from a thread over one connection, until the block ends."""
    watch, done = Watch(psutil.Process(pid)), threading.Event()
    thread = threading.Thread(target=_poll_server, args=(host, port, watch, done), name="poller")
    thread.start()
    try:
        yield watch
    finally:
        done.set()
        thread.join()


def _poll_server(host: str, port: int, watch: Watch, done: threading.Event) -> None:
    """Until the block ends or the server does."""
    with contextlib.suppress(OSError, psutil.NoSuchProcess):
        while not done.is_set():
            with socket.create_connection((host, port), timeout=60) as connection:
                _poll_connection(connection, host, watch, done)


def _poll_connection(connection: socket.socket, host: str, watch: Watch, done: threading.Event) -> None:
    question = f"GET {PATH} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()
    while not done.wait(EVERY):
        asked, computed = time.monotonic(), watch.cpu()
        connection.sendall(question)
        if not connection.recv(65536):
            return  # closed: a new one is made
        watch.saw(time.monotonic() - asked, watch.cpu() - computed)
