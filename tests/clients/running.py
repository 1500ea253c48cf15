"""A real `moedial serve` for clients in a venv of their own, without moedial. It knows no client."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = "infinity-stories"
CONTEXT = 512  # tokens


@contextmanager
def serving(*flags: str) -> Iterator[str]:
    """Start the server of the main venv on a free port; yields its address once it is ready."""
    command = [str(ROOT / ".venv/bin/moedial"), "serve", "--model", MODEL, "--port", "0", "--threads", "1", *flags]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield _address(process)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _address(process: "subprocess.Popen[str]") -> str:
    """The ready line names it; a server that ends before that line closes its output."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"curl (http://[\d.:]+)/", line):
            return match[1]
    raise AssertionError(f"the server ended with code {process.wait()} before it was ready")
