"""What the engine and its own children find in their environment: no API key, whatever the server was started with."""

import asyncio
import os
import sys

import pytest

from engine.grammars.validator import GrammarValidator
from engine.process.child import Child

SECRET = "sk-never-hand-this-on"
SECRETS = ("MOEDIAL_API_KEYS", "moedial_api_keys", "MOEDIAL_API_KEYS_FILE", "MOEDIAL_KEY", "MOEDIAL_PORT")
SLEEP = (sys.executable, "-c", "import time; time.sleep(60)")


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("MOEDIAL_KERNELS", "portable")
    monkeypatch.setenv("OTHER", "kept")


def check(pid: int) -> None:
    with open(f"/proc/{pid}/environ") as environment:
        found = environment.read()
    assert SECRET not in found
    assert "MOEDIAL_KERNELS=portable" in found and "OTHER=kept" in found and "GOMP_SPINCOUNT=" in found


def test_the_engine_process_knows_no_keys() -> None:
    async def test() -> None:
        child = await Child.spawn(SLEEP)
        try:
            check(child.pid)
        finally:
            child.kill()
            await child.close()

    asyncio.run(test())


def test_the_process_that_compiles_grammars_knows_no_keys() -> None:
    judge = GrammarValidator(os.devnull, 10, [])
    judge._command = [
        sys.executable,
        "-c",
        "import sys, time; sys.stdout.write(chr(0) * 4); sys.stdout.flush(); time.sleep(60)",
    ]
    try:
        check(judge._start().pid)
    finally:
        judge._stop()
