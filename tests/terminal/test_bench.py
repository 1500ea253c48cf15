"""`moedial bench serve` against the real server with a fake engine, and against servers that fail."""

import asyncio
import importlib.util
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response, StreamingResponse
from typer.testing import Result

from tests.server.fakes import FakeEngine, says
from tests.server.harness import on_loopback
from tests.terminal.scripted_server import closed_port, delta, ending, event, moedial, scripted_server, stream

SPREAD = {"n", "mean", "p50", "p90", "p99"}


def bench(url: str, *options: str) -> Result:
    return moedial("bench", "serve", "--url", url, *options)


def last_line(result: Result) -> dict[str, Any]:
    line = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(line, dict)
    return line


def story(*_: Any) -> list[int]:
    return list(b"a story")


def test_a_mix(tmp_path: Path) -> None:
    engine = FakeEngine(story)
    with on_loopback(engine) as (url, _):
        options = ("--mix", "1:0.5,8:0.3,default:0.2", "--requests", "20", "--concurrency", "3", "--warmup", "4")
        result = bench(url, *options, "--max-tokens", "7", "--json", str(tmp_path / "line.json"))
    assert result.exit_code == 0, result.output
    line = last_line(result)
    assert json.loads((tmp_path / "line.json").read_text()) == line
    rows = {row["num_experts"]: row for row in line["by_count"]}
    assert {name: row["requests"] for name, row in rows.items()} == {1: 10, 8: 6, "default": 4}
    assert rows["default"]["used"] == [4] and rows[1]["used"] == [1]
    assert all(row["completion_tokens"] == 7 * row["requests"] and not row["errors"] for row in rows.values())
    assert line["all"]["requests"] == line["all"]["ok"] == 20 and line["all"]["itl_ms"]["n"] <= 20 * 6
    counts = Counter(request.budget.per_layer[0] for request in engine.seen[4:])
    assert counts == {1: 10, 8: 6, 4: 4} and len(engine.seen) == 24


def test_the_shape_of_the_line() -> None:
    with on_loopback(FakeEngine(story)) as (url, _):
        line = last_line(bench(url, "--requests", "2", "--key", "secret", "--max-tokens", "3"))
    assert set(line) == {
        *("bench", "url", "model", "settings", "unfinished", "seconds", "requests_per_second", "busy"),
        *("error_examples", "warmup_errors", "all", "by_count"),
    }
    assert line["bench"] == "serve" and line["model"] == "tiny" and line["settings"]["concurrency"] == 8
    assert "secret" not in json.dumps(line)
    for row in (line["all"], *line["by_count"]):
        assert set(row) == {
            *("num_experts", "used", "requests", "ok", "errors", "prompt_tokens", "cached_tokens", "completion_tokens"),
            *("tokens_per_second", "ttft_ms", "itl_ms", "e2e_ms", "stream_tokens_per_second"),
        }
        assert set(row["ttft_ms"]) == set(row["itl_ms"]) == set(row["e2e_ms"]) == SPREAD


def test_the_table_has_a_row_per_count() -> None:
    with on_loopback(FakeEngine(story)) as (url, _):
        result = bench(url, "--requests", "4", "--mix", "2:1,default:1", "--max-tokens", "3")
    heads = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    assert [head for head in heads if head in ("2", "default", "all")] == ["2", "default", "all"]
    assert "used 4" in result.stdout and "TTFT, ms" in result.stdout


def test_lengths_are_exact_and_follow_from_the_seed() -> None:
    runs = []
    for _ in range(2):
        engine = FakeEngine(story)
        with on_loopback(engine) as (url, _service):
            result = bench(url, "--requests", "8", "--prompt-tokens", "5-9", "--max-tokens", "2", "--concurrency", "1")
        assert last_line(result)["all"]["prompt_tokens"] == sum(len(request.prompt) for request in engine.seen)
        runs.append([(request.prompt, request.sampling.seed) for request in engine.seen])
    assert runs[0] == runs[1] and len({seed for _, seed in runs[0]}) == 8
    assert len({prompt[:3] for prompt, _ in runs[0]}) > 6
    assert {len(prompt) for prompt, _ in runs[0]} <= set(range(5, 10)) and len({len(p) for p, _ in runs[0]}) > 1


def test_chat_with_lengths_and_arrivals() -> None:
    engine = FakeEngine(story)
    with on_loopback(engine) as (url, _):
        options = (
            "--endpoint",
            "chat",
            "--prompt-tokens",
            "6",
            "--rate",
            "200",
            "--requests",
            "5",
            "--max-tokens",
            "2",
        )
        line = last_line(bench(url, *options))
    assert line["all"]["ok"] == 5 and line["settings"]["concurrency"] is None
    prompts = [bytes(request.prompt) for request in engine.seen]
    assert all(prompt.startswith(b"<user>") and len(prompt) == len(b"<user><assistant>") + 6 for prompt in prompts)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\n  two \n")
    engine = FakeEngine(story)
    with on_loopback(engine) as (url, _):
        bench(url, "--prompts", str(tmp_path / "prompts.txt"), "--requests", "3", "--concurrency", "1")
    assert [bytes(request.prompt).decode() for request in engine.seen] == ["one", "two", "one"]


@pytest.mark.parametrize(("flag", "tokens"), [("--ignore-eos", 8), ("--no-ignore-eos", 3)])
def test_ends_of_text(flag: str, tokens: int) -> None:
    engine = FakeEngine(lambda request: [*says("ab")(request), *b"cdefg"])
    with on_loopback(engine) as (url, _):
        line = last_line(bench(url, "--requests", "2", "--max-tokens", "8", flag))
    assert line["all"]["completion_tokens"] == 2 * tokens


def test_every_failure_is_counted_with_its_reason() -> None:
    full = {"error": {"message": "it is full", "code": "queue_full"}}
    text = event({"choices": [{"index": 0, "text": "a"}]})
    answers = (
        lambda: JSONResponse(full, 503),
        lambda: stream(text, b"event: error\n" + event({"error": {"message": "slow", "code": "timeout"}})),
        lambda: stream(text),
        lambda: stream(text, b"data: [DONE]\n\n"),
        lambda: stream(event({"choices": [7]})),
        lambda: JSONResponse(full, 503),
        lambda: stream(text, ending()),
    )
    with scripted_server(*answers) as met:
        result = bench(met.url, "--requests", "9", "--concurrency", "1", "--warmup", "1")
    line = last_line(result)
    assert line["all"]["errors"] == {
        "stream error: timeout": 1,
        "stream cut short": 1,
        "no usage in the stream": 1,
        "bad chunk": 1,
        "HTTP 503 queue_full": 1,
    }
    assert line["warmup_errors"] == {"HTTP 503 queue_full": 1}
    assert (line["all"]["requests"], line["all"]["ok"], line["all"]["e2e_ms"]["n"]) == (9, 4, 4)
    assert "1 failed with HTTP 503 queue_full, the first: it is full" in result.stdout
    assert result.exit_code == 1 and "5 of 9 requests failed" in result.stderr


@pytest.mark.parametrize(("failures", "status"), [(1, 0), (2, 1)])
def test_half_of_the_requests_failed(failures: int, status: int, tmp_path: Path) -> None:
    def good() -> Response:
        return stream(event({"choices": [{"index": 0, "text": "a"}]}), ending())

    def bad() -> Response:
        return JSONResponse({"error": {"message": "full", "code": "queue_full"}}, 503)

    with scripted_server(*[bad] * failures, *[good] * (4 - failures)) as met:
        path = tmp_path / "line.json"
        result = bench(met.url, "--requests", "4", "--concurrency", "1", "--json", str(path))
    assert result.exit_code == status and json.loads(path.read_text())["all"]["ok"] == 4 - failures


def test_a_burst_is_one_arrival() -> None:
    """Ten tokens in three writes, each token an HTTP chunk of its own."""
    sizes = (1, 5, 4)

    def bursts() -> Response:
        async def parts() -> AsyncIterator[bytes]:
            for size in sizes:
                yield b"".join(event({"choices": [{"index": 0, "text": "a"}]}) for _ in range(size))
                await asyncio.sleep(0.05)
            yield ending(completion_tokens=10)

        return StreamingResponse(parts(), media_type="text/event-stream")

    with scripted_server(bursts) as met:
        line = last_line(bench(met.url, "--requests", "2", "--concurrency", "1"))
    assert line["all"]["itl_ms"]["n"] == 2 * 2 and line["all"]["itl_ms"]["p50"] > 25
    assert line["all"]["completion_tokens"] == 20


def test_parts_of_one_read_are_one_arrival() -> None:
    """A server that writes a burst at once, each token an HTTP chunk of its own."""

    def answer(connection: socket.socket) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        token = event({"choices": [{"index": 0, "text": "a"}]})
        with connection:
            connection.recv(1 << 16)
            connection.sendall(head + b"".join(map(framed, [token] * 6)))
            time.sleep(0.05)
            connection.sendall(b"".join(map(framed, [token] * 3)) + framed(ending()) + b"0\r\n\r\n")

    def framed(part: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(part), part)

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        thread = threading.Thread(target=lambda: answer(listener.accept()[0]))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        result = bench(url, "--model", "any", "--requests", "1")
        thread.join(5)
    line = last_line(result)
    assert line["all"]["itl_ms"]["n"] == 1 and line["all"]["itl_ms"]["p50"] > 25


def test_counts_that_the_server_refuses_are_failures() -> None:
    with on_loopback(FakeEngine(story)) as (url, _):
        result = bench(url, "--mix", "99:1", "--requests", "2")
    assert result.exit_code == 1 and "no request went well" in result.stderr
    assert last_line(result)["all"]["errors"] == {"HTTP 400 invalid_value": 2}


def test_a_request_that_takes_too_long() -> None:
    def endless() -> Any:
        async def parts() -> Any:
            import asyncio

            while True:
                yield delta(content="x")
                await asyncio.sleep(0.02)

        from starlette.responses import StreamingResponse

        return StreamingResponse(parts(), media_type="text/event-stream")

    with scripted_server(endless) as met:
        result = bench(met.url, "--requests", "2", "--endpoint", "chat", "--timeout", "0.2")
    assert last_line(result)["all"]["errors"] == {"timeout": 2}


def test_a_plot(tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    with on_loopback(FakeEngine(story)) as (url, _):
        result = bench(url, "--requests", "6", "--mix", "1:1,8:1,default:1", "--plot", str(path), "--max-tokens", "5")
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mix", "1:x"), "count:share pairs"),
        (("--rate", "1", "--concurrency", "2"), "exclude each other"),
        (("--prompt-tokens", "x"), "N or LOW-HIGH"),
        (("--timeout", "nan"), "--timeout"),
        (("--plot", "x.doc"), "must end in one of"),
        (("--json", "/nowhere/at/all.json"), "no such folder"),
        (("--url", "nowhere"), "--url must be an address"),
    ],
)
def test_options_that_cannot_be_done(options: tuple[str, ...], message: str) -> None:
    result = moedial("bench", "serve", "--url", closed_port(), *options)
    assert result.exit_code == 2 and message in result.stderr and not result.stdout


def test_without_matplotlib_the_run_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("terminal.bench.plot.find_spec", lambda name: None if name == "matplotlib" else find(name))
    result = bench(closed_port(), "--plot", "x.png")
    assert result.exit_code == 2 and "pip install 'moedial[training]'" in result.stderr


def test_no_server_is_one_line() -> None:
    result = bench(closed_port())
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1 and "cannot connect" in result.stderr


def test_lengths_need_tokenize() -> None:
    with scripted_server(lambda: stream(ending())) as met:
        result = bench(met.url, "--prompt-tokens", "8")
    assert result.exit_code == 1 and "--prompt-tokens needs /tokenize" in result.stderr
