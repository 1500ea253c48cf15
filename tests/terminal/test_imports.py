"""What loading the commands costs: `moedial serve` and --help pay for no HTTP client, and the terminal is no server."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("terminal.cli", "httpx rich matplotlib orjson asyncio"),
        ("terminal.cli terminal.chat terminal.bench.serve", "matplotlib torch fastapi server engine model weights"),
    ],
)
def test_imports(modules: str, absent: str) -> None:
    code = f"import sys, {modules.replace(' ', ', ')}; print(*sorted(set({absent.split()}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not run.stdout.strip()
