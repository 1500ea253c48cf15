"""Log lines: the same in both processes, in two formats, and no value can forge one."""

import json
import re
import subprocess
import sys

import pytest

from engine.logs import as_json, as_text

TIME = "2026-11-26T17:02:43.123456Z"


def line(format: str, **fields: object) -> str:
    event = {"timestamp": TIME, "level": "info", "logger": "server", **fields}
    return str((as_text if format == "text" else as_json)(None, "info", event))


def test_text_is_for_people() -> None:
    said = line("text", event="call", seconds=0.25, id="cmpl-1", why="two words", outcomes=["stop"])
    assert said == '2026-11-26T17:02:43Z info server: call seconds=0.25 id=cmpl-1 why="two words" outcomes=["stop"]'
    assert json.loads(line("json", event="call", seconds=0.25))["seconds"] == 0.25


@pytest.mark.parametrize("format", ["text", "json"])
@pytest.mark.parametrize("evil", ["a\n{}", "\x1b[2J", "\x9b2J", "a\u2028b", "\ud800", "\x7f"])
def test_no_value_forges_a_line_or_moves_a_cursor(format: str, evil: str) -> None:
    said = line(format, event=evil, value=evil, many=[evil], exception=f"Traceback\nValueError: {evil}")
    said.encode()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", said)
    assert all(part.startswith("    ") for part in said.split("\n")[1:])
    assert format == "text" or json.loads(said)["value"] == evil.replace("\ud800", "\\ud800")


def test_what_no_json_can_hold_is_still_written() -> None:
    for value in (2**70, {1: 2}, ["\ud800"], object()):
        for format in ("text", "json"):
            assert "odd" in line(format, event="odd", value=value)
        assert json.loads(line("json", event="odd", value=value))["event"] == "odd"


@pytest.mark.parametrize(("level", "format", "shown"), [("info", "json", 1), ("error", "text", 0)])
def test_the_engine_process_writes_as_it_is_told(level: str, format: str, shown: int) -> None:
    """The lines of a real engine process, started by its client."""
    code = f"""
import asyncio, sys
from engine.process.client import EngineClient
from engine.types import EngineSettings

async def main():
    settings = EngineSettings("talking", log_level={level!r}, log_format={format!r})
    client = EngineClient(settings, command=(sys.executable, "-m", "tests.engine.fake"))
    await client.start()
    await client.ready(30)
    await client.stop()

asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    lines = [said for said in ended.stderr.splitlines() if "loading the" in said]
    assert len(lines) == shown, ended.stderr
    if shown:
        assert json.loads(lines[0])["level"] == "info" and json.loads(lines[0])["logger"] == "tests.engine.fake"
