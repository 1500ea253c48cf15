"""What does HTTP cost? `make bench-http`.

Measures: N streams at once (32 random tokens in, 128 out, greedy, the end of a text ignored) through `moedial serve`
over loopback, every token an event of its own, and the same requests on an engine alone in this process; new tokens
over the time from the first request to the last token, the median of runs that take turns. Ceiling: 1, the engine
alone has both cores to itself, while the server's HTTP process and this client share them with its engine. The client
reads sockets and looks for the end of each stream, no more; it takes its share of a core all the same, as a client on
the same machine does. No prefix cache.
"""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import torch
import typer

from benchmarks.checkpoints import CHECKPOINTS, write_random
from benchmarks.machine import facts, introduce, use_threads
from benchmarks.tables import grid
from engine.build import build_engine
from engine.engine import Engine
from engine.types import EngineInfo, EngineSettings, Request, Sampling
from weights.folder import BUNDLED, bundled_models

PROMPT, OUTPUT = 32, 128
END = b"data: [DONE]"
MOST = 64
COMMON: dict[str, Any] = {"prefix_cache": False, "max_running": MOST}


def prompts(streams: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(streams)
    return torch.randint(3, vocabulary, (streams, PROMPT), generator=generator).tolist()


def alone(engine: Engine, info: EngineInfo, count: int, tokens: list[list[int]]) -> float:
    """Tokens per second of the engine in this process."""
    for number, prompt in enumerate(tokens):
        sampling = Sampling(OUTPUT, seed=1, temperature=0.0)
        engine.add(Request(str(number), tuple(prompt), info.experts.budget(count), sampling))
    began = time.perf_counter()
    while engine.has_work:
        engine.step()
    return len(tokens) * OUTPUT / (time.perf_counter() - began)


class Stream(asyncio.Protocol):
    """One request; its answer is only counted."""

    def __init__(self, body: bytes, ended: asyncio.Future[bytes]) -> None:
        self.body, self.ended, self.tail = body, ended, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(self.body)}\r\n"
        transport.write(head.encode() + b"content-type: application/json\r\n\r\n" + self.body)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.tail = self.tail[-2048:] + data
        if END in self.tail[-256:] and not self.ended.done():
            self.ended.set_result(self.tail)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(f"the stream ended early: {self.tail[-300:]!r}"))


async def through_http(port: int, count: int, tokens: list[list[int]]) -> float:
    """Tokens per second of as many streams as there are prompts."""
    loop = asyncio.get_running_loop()
    fixed = {
        "max_tokens": OUTPUT,
        "temperature": 0,
        "seed": 1,
        "ignore_eos": True,
        "num_experts": count,
        "stream": True,
    }
    bodies = [json.dumps(fixed | {"prompt": prompt, "stream_options": {"include_usage": True}}) for prompt in tokens]
    futures: list[asyncio.Future[bytes]] = [loop.create_future() for _ in bodies]
    began = time.perf_counter()
    for body, future in zip(bodies, futures, strict=True):
        await loop.create_connection(lambda b=body, f=future: Stream(b.encode(), f), "127.0.0.1", port)  # type: ignore[misc]
    tails = await asyncio.gather(*futures)
    seconds = time.perf_counter() - began
    if not all(f'"completion_tokens":{OUTPUT}'.encode() in tail for tail in tails):
        raise RuntimeError("a stream did not get all its tokens")
    return len(tokens) * OUTPUT / seconds


@contextmanager
def server(model: str, flags: list[str]) -> Iterator[tuple[int, psutil.Process]]:
    """A server on a free port, and its process."""
    command = [str(Path(sys.executable).with_name("moedial")), "serve", "--model", model, "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "curl" in line)
        yield int(line.partition("127.0.0.1:")[2].partition("/")[0]), psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def busy(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measured(model: str, count: int, streams: list[int], repeats: int, threads: int) -> list[dict[str, Any]]:
    """A row per number of streams."""
    flags = ["--no-prefix-cache", "--max-running", str(MOST), "--threads", str(threads), "--log-level", "error"]
    settings = EngineSettings(model=model, threads=threads, **COMMON)
    engine, info = build_engine(settings)
    count = count or info.experts.trained
    rows = []
    with server(model, flags) as (port, process):
        for wanted in streams:
            tokens = prompts(wanted, info.vocabulary)
            runs: list[tuple[float, float, float]] = []
            for _ in range(repeats + 1):
                own, spent = alone(engine, info, count, tokens), busy(process)
                http = asyncio.run(through_http(port, count, tokens))
                runs.append((own, http, (busy(process) - spent) / (wanted * OUTPUT)))
            own, http, spent = (median(column) for column in zip(*runs[1:], strict=True))
            ratio = median(http / own for own, http, _ in runs[1:])
            rows.append(
                {"streams": wanted, "engine": own, "http": http, "ratio": ratio, "http_cpu_us_per_token": spent * 1e6}
            )
    return rows


def main(
    models: Annotated[list[str], typer.Option("--model", help="bundled, or random of benchmarks.checkpoints")] = [  # noqa: B006
        "infinity-stories",
        "olmoe-0.9b-random",
    ],
    count: Annotated[int, typer.Option(help="expert count; 0: as trained")] = 0,
    streams: Annotated[list[int], typer.Option("--streams")] = [1, 16, 64],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(help="0: all cores")] = 0,
) -> None:
    """Print a table for people and one JSON line for machines."""
    use_threads(threads)
    machine, found = facts(), {}
    introduce(machine)
    for model in models:
        with ExitStack() as stack:
            folder = str(BUNDLED / model)
            if model not in bundled_models():
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                write_random(CHECKPOINTS[model], Path(folder))
            rows = found[model] = measured(folder, count, streams, repeats, threads)
        head = ["streams", "engine, tok/s", "HTTP, tok/s", "HTTP / engine", "HTTP process, µs per token"]
        keys = (("engine", ",.0f"), ("http", ",.0f"), ("ratio", ".3f"), ("http_cpu_us_per_token", ".0f"))
        lines = [[str(row["streams"]), *(format(row[key], how) for key, how in keys)] for row in rows]
        print(f"\n**{model}**\n\n{grid(head, lines)}\n", flush=True)
    print(json.dumps({"benchmark": "http", "machine": machine, "models": found}))


if __name__ == "__main__":
    typer.run(main)
