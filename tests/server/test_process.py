"""Settings, the command, logs and signals: what an operator sees."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from server.cli import app
from server.configuration.options import flag_of
from server.logs import configure
from server.metrics import SERIES, metrics_table
from server.settings import Settings, settings_table
from tests.server.harness import eventually

SERVE = textwrap.dedent("""
    import asyncio, sys
    import server.serve as serve
    from server.settings import Settings
    from server.app import create_app
    from tests.server.fakes import FakeEngine, FakeTokenizer, says
    from tests.server.harness import CARD

    class Pause:  # the first token comes at once, then nothing for a while
        waits = 0
        async def wait(self):
            self.waits += 1
            await asyncio.sleep(float(sys.argv[2]) if self.waits == 2 else 0)

    engine = FakeEngine(says("x" * 200))
    engine.gate = Pause()
    settings = Settings(model="tiny", port=0, drain_seconds=float(sys.argv[1]))
    app = create_app(settings, engine, FakeTokenizer(), None, CARD)
    serve.ModelServer(serve.config_of(settings, app), app.state.service).run()
""")

LIKE_ABOVE = pytest.mark.redundant  # each command takes a second


def test_flag_beats_variable_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDIAL_PORT", "9001")
    monkeypatch.setenv("MOEDIAL_ALIASES", "fast=2, strong=8")
    monkeypatch.setenv("MOEDIAL_API_KEYS", "sk-one,sk-two")
    settings = Settings()
    assert settings.port == 9001 and Settings(port=9002).port == 9002 and settings.max_n == 8
    assert settings.aliases == {"fast": 2, "strong": 8}
    assert [key.get_secret_value() for key in settings.api_keys] == ["sk-one", "sk-two"] and "sk-" not in repr(settings)


def test_a_list_may_be_given_as_words_or_by_repeating_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Settings] = []
    monkeypatch.setattr("server.serve.run", given.append)
    flags = ["--allow-origin", "https://a.example", "--allow-origin", "https://b.example,null", "--port", "1"]
    assert CliRunner().invoke(app, ["serve", *flags]).exit_code == 0
    assert given[0].allow_origin == ("https://a.example", "https://b.example", "null") and not given[0].allowed_hosts


def test_the_engine_gets_every_option_of_its_own() -> None:
    options: dict[str, Any] = {
        "tokenizer": "/models/other",
        "dtype": "bfloat16",
        "device": "cuda:1",
        "allow_extrapolated_experts": True,
        "generation_config": "none",
        "quantize": "int8",
        "quantize_layers": "all",
        "threads": 3,
        "block_size": 8,
        "kv_cache_dtype": "int8",
        "kv_cache_bytes": 4096,
        "kv_cache_fraction": 0.5,
        "max_model_len": 100,
        "max_running": 5,
        "max_step_tokens": 77,
        "step_ms": 9,
        "stream_interval_ms": 7,
        "prefix_cache": False,
        "prefix_snapshots": 3,
        "prefix_snapshot_tokens": 512,
        "speculate": "ngram",
        "default_num_experts": 2,
        "aliases": {"fast": 1},
        "log_level": "debug",
        "log_format": "json",
        "ranks": 2,
        "rank_address": "10.0.0.1:29500",
        "rank_seconds": 5.0,
    }
    unasked = {"model": "folder", "terminal_columns": 0}
    assert asdict(Settings(**options).engine_settings(Path("folder"))) == unasked | options


def test_every_option_is_a_flag_with_its_variable_and_a_row_in_the_docs() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"}).output
    for name in Settings.model_fields:
        flag, variable = "--" + name.replace("_", "-"), "MOEDIAL_" + name.upper()
        assert f"`{flag}` | `{variable}`" in settings_table()
        assert flag in shown and variable in shown
    assert all(f"moedial:{series.name}" in metrics_table() for series in SERIES)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["serve", "nowhere-at-all"], 1, "nowhere-at-all"),
        (["serve", "--port", "x"], 2, "--port (MOEDIAL_PORT)"),
        pytest.param(["serve", "--aliases", "fast"], 2, "--aliases", marks=LIKE_ABOVE),
        (["serve", "here", "--model", "there"], 2, "MODEL is 'here' and --model is 'there'"),
        pytest.param(["serve", "--model", "nowhere-at-all"], 1, "nowhere-at-all", marks=LIKE_ABOVE),
        pytest.param(["version"], 0, "", marks=LIKE_ABOVE),
        (["--version"], 0, ""),
    ],
)
def test_the_command_ends_with_one_clear_line(arguments: list[str], code: int, words: str) -> None:
    command = [sys.executable, "-c", "from server.cli import main; main()", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == code, ended.stderr
    assert words in ended.stderr and "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == (1 if code else 0)


def test_the_help_is_readable_at_80_columns() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "80"}).output.splitlines()
    assert max(map(len, shown)) <= 80
    flags = {line.split()[0] for line in shown if line.startswith("  --")}
    for name in Settings.model_fields:
        flag = flag_of(name)
        assert flag in flags or f"{flag}/--no-{flag[2:]}" in flags  # none is cut
        assert any(f"MOEDIAL_{name.upper()}" in line for line in shown)


def test_log_lines_cannot_be_forged(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:]
    try:
        configure("info")
        logging.getLogger("server").warning('a\n{"level":"error"} \ud800 %s', "b\nc")
    finally:
        logging.getLogger().handlers[:] = before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("{") and "\\n" in lines[0]


def started(drain: float, pause: float) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(drain), str(pause)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "s: tiny (infinity_moe, 1 to 8 experts per token)" in line
    commands = [process.stdout.readline() for _ in range(2)]
    assert '"num_experts":1' in commands[0] and '"num_experts":8' in commands[1]
    url = commands[0].split("curl ")[1].split("/v1/")[0]
    assert line.endswith(f" at {url}\n")
    assert process.stdout.readline() == f"  moedial chat --url {url}\n"
    assert process.stdout.readline() == f"  page: {url}/\n"
    assert process.stdout.readline() == f"  docs: {url}/docs\n"
    return process, url


def test_sigterm_drains_and_exits_with_zero() -> None:
    process, url = started(drain=10, pause=1)
    try:
        body = {"prompt": "hi", "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=10) as response:
            os.kill(process.pid, signal.SIGTERM)
            eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 503
            assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"
        assert process.wait(10) == 0
    finally:
        process.kill()


def test_a_second_signal_stops_at_once() -> None:
    process, url = started(drain=60, pause=30)
    try:
        body = {"prompt": "hi", "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=10) as response:
            os.kill(process.pid, signal.SIGTERM)
            eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
            os.kill(process.pid, signal.SIGTERM)
            began = time.monotonic()
            assert process.wait(5) == 0 and time.monotonic() - began < 3
            assert "event: error" in list(response.iter_lines())
    finally:
        process.kill()
