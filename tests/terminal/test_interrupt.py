"""Ctrl-C, in a process of its own: it stops an answer, tells the server by hanging up, and keeps what there is."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.types import Request
from tests.server.fakes import FakeEngine
from tests.server.harness import eventually, on_loopback

# a shell may have told its background jobs to ignore Ctrl-C, which would pass on to this child
CHILD = """
import signal, typer
signal.signal(signal.SIGINT, signal.default_int_handler)
from terminal.cli import bench, chat, run_once
app = typer.Typer()
app.command("chat")(chat)
app.command("run")(run_once)
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


def held_after_five() -> FakeEngine:
    engine = FakeEngine()
    engine.gate, engine.free = asyncio.Event(), 5
    return engine


@pytest.fixture
def ours() -> Iterator[tuple[int, int]]:
    """The two ends of a terminal, without echo."""
    ends = pty.openpty()
    settings = termios.tcgetattr(ends[1])
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(ends[1], termios.TCSANOW, settings)
    yield ends
    for end in ends:
        os.close(end)


def read_until(end: int, text: str) -> str:
    shown = b""
    while not shown.endswith(text.encode()):
        shown += os.read(end, 1)
    return shown.decode()


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(
    children: list[subprocess.Popen[str]], ours: tuple[int, int]
) -> None:
    engine, (person, terminal) = held_after_five(), ours
    with on_loopback(engine) as (url, _):
        words = [sys.executable, "-c", CHILD, "chat", "--url", url]
        environment = os.environ | {"TERM": "dumb"}
        child = subprocess.Popen(
            words, text=True, env=environment, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE
        )
        children.append(child)
        read_until(person, "> ")
        os.write(person, b"first\n")
        read_until(person, "hello")
        child.send_signal(signal.SIGINT)
        assert "\nstopped\r\n" in read_until(person, "> ")
        eventually(lambda: engine.aborted)
        engine.gate = None
        os.write(person, b"second\n")
        assert "hello world\r\n" in read_until(person, "> ")
        os.write(person, b"\x04")
        _, faults = child.communicate(timeout=30)
    assert child.returncode == 0 and not faults
    assert bytes(engine.seen[1].prompt).decode() == "<user>first<assistant>hello<user>second<assistant>"


@pytest.mark.slow
@pytest.mark.parametrize("words", [("chat",), ("run", "first")])
def test_without_a_terminal_ctrl_c_is_the_end(children: list[subprocess.Popen[str]], words: tuple[str, ...]) -> None:
    engine = held_after_five()
    with on_loopback(engine) as (url, _):
        child = start(*words, "--url", url)
        children.append(child)
        assert child.stdin and child.stdout
        print("first", file=child.stdin, flush=True)
        assert child.stdout.read(5) == "hello"
        child.send_signal(signal.SIGINT)
        shown, faults = child.communicate("second\n", timeout=30)
        eventually(lambda: engine.aborted)
    assert child.returncode == 130 and not faults and len(engine.seen) == 1
    assert shown.strip() == ""


@pytest.mark.slow
def test_ctrl_c_ends_a_benchdelimiter(children: list[subprocess.Popen[str]]) -> None:
    engine = FakeEngine()
    engine.gate = asyncio.Event()
    with on_loopback(engine) as (url, _):
        child = start("bench", "serve", "--url", url, "--concurrency", "2", "--max-tokens", "9")
        children.append(child)
        eventually(lambda: len(engine.running) == 2, 20)
        child.send_signal(signal.SIGINT)
        _, faults = child.communicate(timeout=30)
        assert child.returncode == 130 and "Traceback" not in faults
        eventually(lambda: not engine.running)


@pytest.mark.slow
def test_ctrl_c_keeps_what_a_benchdelimiter_has_measured(children: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    """Three requests end, one after the other, and the fourth hangs."""

    def script(request: Request) -> list[int]:
        if len(engine.seen) > 3:
            engine.gate = asyncio.Event()
        return list(b"a story")

    engine, path = FakeEngine(script), tmp_path / "line.json"
    with on_loopback(engine) as (url, _):
        options = ("--concurrency", "1", "--max-tokens", "9", "--requests", "40", "--json", str(path))
        child = start("bench", "serve", "--url", url, *options)
        children.append(child)
        eventually(lambda: len(engine.seen) == 4 and engine.gate, 20)
        child.send_signal(signal.SIGINT)
        shown, faults = child.communicate(timeout=30)
    line = json.loads(path.read_text())
    assert child.returncode == 130 and not faults
    assert line["all"]["ok"] == 3 and line["unfinished"] == 37
    assert json.loads(shown.splitlines()[-1]) == line
    assert "stopped by Ctrl-C: 37 requests had not ended" in shown and "TTFT, ms" in shown
