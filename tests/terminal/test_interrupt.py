"""Ctrl-C, in a process of its own: it stops an answer, tells the server by hanging up, and keeps the conversation."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.server.fakes import FakeEngine
from tests.server.harness import eventually, on_loopback

# a shell may have told its background jobs to ignore Ctrl-C, which would pass on to this child
CHILD = """
import signal, typer
signal.signal(signal.SIGINT, signal.default_int_handler)
from terminal.cli import bench, chat
app = typer.Typer()
app.command("chat")(chat)
app.add_typer(bench)
app()
"""


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for child in started:
        child.kill()
        child.communicate()


def start(*words: str) -> subprocess.Popen[str]:
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen([sys.executable, "-c", CHILD, *words], text=True, encoding="utf-8", **pipes)


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(children: list[subprocess.Popen[str]]) -> None:
    engine = FakeEngine()
    engine.gate, engine.free = asyncio.Event(), 5
    with on_loopback(engine) as (url, _):
        child = start("chat", "--url", url)
        children.append(child)
        assert child.stdin and child.stdout
        print("first", file=child.stdin, flush=True)
        while child.stdout.read(1) != "\n":
            pass  # the greeting
        assert child.stdout.read(5) == "hello"
        child.send_signal(signal.SIGINT)
        eventually(lambda: engine.aborted)
        engine.gate = None
        shown, faults = child.communicate("second\n", timeout=30)
    assert child.returncode == 0 and not faults
    assert shown.startswith("\nstopped\nhello world\n")
    assert bytes(engine.seen[1].prompt).decode() == "<user>first<assistant>hello<user>second<assistant>"


@pytest.mark.slow
def test_ctrl_c_ends_a_benchmark(children: list[subprocess.Popen[str]]) -> None:
    engine = FakeEngine()
    engine.gate = asyncio.Event()
    with on_loopback(engine) as (url, _):
        child = start("bench", "serve", "--url", url, "--concurrency", "2", "--max-tokens", "9")
        children.append(child)
        eventually(lambda: len(engine.running) == 2, 20)
        child.send_signal(signal.SIGINT)
        _, faults = child.communicate(timeout=30)
        assert child.returncode not in (0, None) and "Traceback" not in faults
        eventually(lambda: not engine.running)
