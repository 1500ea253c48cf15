"""Servers for the page's tests, run by the main venv: with a fake engine, or a bundled model. It knows no page."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

COMMON = "The same for all counts, then "  # how answers of the fake engine begin
ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv/bin/python"
SERVE = "import sys; sys.argv[0] = 'moedial'; from server.cli import main; main()"


@dataclass
class Fake:
    """A running server with a fake engine."""

    url: str  # of the page, with the slash at its end
    commands: IO[str]

    def set_engine(self, state: str) -> None:
        """`down` or `up`."""
        self.commands.write(f"{state}\n")
        self.commands.flush()


@contextmanager
def fake(*flags: str) -> Iterator[Fake]:
    """A server with a fake engine. Its standard input carries commands, and ends it."""
    with _started(str(PYTHON), "-m", "tests.page.fake_server", *flags) as process:
        assert process.stdin is not None and process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, "the fake server ended before it was ready"
        yield Fake(url, process.stdin)


@contextmanager
def bundled(model: str, *flags: str) -> Iterator[str]:
    """`moedial serve` with a bundled model; yields the address that it prints for the page."""
    command = (str(PYTHON), "-c", SERVE, "serve", "--model", model, "--port", "0", "--threads", "1", *flags)
    command += ("--log-level", "warning")
    with _started(*command) as process:
        assert process.stdout is not None
        yield _page_address(process.stdout)


def _page_address(lines: IO[str]) -> str:
    for line in lines:
        if match := re.fullmatch(r"  page: (http://[\d.:]+/)\n", line):
            return match[1]
    raise AssertionError("the server ended before it was ready")


@contextmanager
def _started(*command: str) -> Iterator["subprocess.Popen[str]"]:
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
