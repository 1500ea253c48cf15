"""What does HTTP cost? `make bench-http`.

Measures: N streams at once (32 random tokens in, 256 out, greedy, the end of a text ignored) through `moedial serve`
over loopback, every token an event of its own, and the same requests on an engine alone in this process; new tokens
over the time from the first request to the last token, the median of runs that take turns. Ceiling: 1, the engine
alone has both cores to itself, while the server's HTTP process shares them with its engine. The client stands for one
on another machine, so it must take next to nothing from either: it empties its sockets ten times a second and asks the
kernel when the last bytes came. Requests come one after the other, so that a batch fills and empties in steps: that is
part of what is measured, and weighs less the longer the answers. No prefix cache. Where a process got its memory can
make it faster or slower by some percent for all its life, so both are loaded several times.
"""

import gc
import json
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import mean, median
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

PROMPT, OUTPUT = 32, 256
END = b"data: [DONE]"
MOST = 64
GLANCE = 0.1  # seconds between two looks at the sockets; what comes meanwhile fits their buffers
TIMESTAMPS = 35  # SO_TIMESTAMPNS of Linux: when what is read arrived, by the real-time clock
TIMESPEC = struct.Struct("@ll")  # seconds and nanoseconds
TIMESPEC_SPACE = socket.CMSG_SPACE(TIMESPEC.size)
Round = tuple[float, float, float]  # tokens per second alone and through HTTP, and the HTTP process's seconds per token
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


class Stream:
    """One request; its answer is only read, and its end kept, with when it came."""

    def __init__(self, port: int, body: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.SOL_SOCKET, TIMESTAMPS, 1)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        self.socket.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        self.socket.setblocking(False)
        self.tail, self.arrived = b"", 0.0

    @property
    def ended(self) -> bool:
        return END in self.tail[-256:]

    def read(self) -> None:
        with suppress(BlockingIOError):
            while True:
                data, extra, _, _ = self.socket.recvmsg(1 << 18, TIMESPEC_SPACE)
                if not data:
                    break
                self.tail = (self.tail + data)[-2048:]
                seconds, nanoseconds = TIMESPEC.unpack(extra[0][2])
                self.arrived = seconds + nanoseconds / 1e9
                if self.ended:
                    return
            raise ConnectionError(f"the stream ended early: {self.tail[-300:]!r}")


def through_http(port: int, count: int, tokens: list[list[int]]) -> float:
    """Tokens per second of as many streams as there are prompts."""
    fixed: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    fixed |= {"max_tokens": OUTPUT, "temperature": 0, "seed": 1, "ignore_eos": True, "num_experts": count}
    bodies = [json.dumps(fixed | {"prompt": prompt}).encode() for prompt in tokens]
    began = time.time()
    streams = [Stream(port, body) for body in bodies]
    while going := [stream for stream in streams if not stream.ended]:
        time.sleep(GLANCE)
        for stream in going:
            stream.read()
    seconds = max(stream.arrived for stream in streams) - began
    for stream in streams:
        stream.socket.close()
        if f'"completion_tokens":{OUTPUT}'.encode() not in stream.tail:
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
        address = line.partition("127.0.0.1:")[2]
        yield int(address.partition("/")[0]), psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def busy(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _round(
    engine: Engine, info: EngineInfo, count: int, port: int, process: psutil.Process, tokens: list[list[int]]
) -> Round:
    """Engine, HTTP twice, engine, so that a drift of the machine hits both alike; and the HTTP process's seconds."""
    first, spent = alone(engine, info, count, tokens), busy(process)
    http = mean([through_http(port, count, tokens) for _ in range(2)])
    spent = (busy(process) - spent) / (2 * len(tokens) * OUTPUT)
    return mean([first, alone(engine, info, count, tokens)]), http, spent


def measured(
    model: str, count: int, streams: list[int], seconds: float, pairs: int, threads: int
) -> list[dict[str, Any]]:
    """A row per number of streams."""
    flags = ["--no-prefix-cache", "--max-running", str(MOST), "--threads", str(threads), "--log-level", "error"]
    settings = EngineSettings(model=model, threads=threads, **COMMON)
    runs: dict[int, list[Round]] = {wanted: [] for wanted in streams}
    for _ in range(pairs):
        engine, info = build_engine(settings)
        with server(model, flags) as (port, process):
            run = partial(_round, engine, info, count or info.experts.trained, port, process)
            run(prompts(1, info.vocabulary))  # thrown away
            for wanted in streams:
                until = time.monotonic() + seconds / pairs
                tokens = prompts(wanted, info.vocabulary)
                runs[wanted].append(run(tokens))
                while time.monotonic() < until:
                    runs[wanted].append(run(tokens))
        del engine, run
        gc.collect()
    return [_row(wanted, runs[wanted]) for wanted in streams]


def _row(streams: int, runs: list[Round]) -> dict[str, Any]:
    own, http, spent = (median(column) for column in zip(*runs, strict=True))
    ratio = median(http / own for own, http, _ in runs)
    row = {"streams": streams, "rounds": len(runs), "engine": own, "http": http, "ratio": ratio}
    return row | {"http_cpu_us_per_token": spent * 1e6}


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of one line of the table."""
    keys = (("engine", ",.0f"), ("http", ",.0f"), ("ratio", ".3f"), ("http_cpu_us_per_token", ".0f"))
    figures = [format(row[key], how) for key, how in keys]
    return [str(row["streams"]), str(row["rounds"]), *figures]


def main(
    models: Annotated[list[str], typer.Option("--model", help="bundled, or random of benchmarks.checkpoints")] = [  # noqa: B006
        "infinity-stories",
        "olmoe-0.9b-random",
    ],
    count: Annotated[int, typer.Option(help="expert count; 0: as trained")] = 0,
    streams: Annotated[list[int], typer.Option("--streams")] = [1, 16, 64],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="for the rounds of a row, which swing by a tenth and more")] = 200,
    pairs: Annotated[int, typer.Option(help="server and engine, loaded again each time", min=1)] = 5,
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
            rows = found[model] = measured(folder, count, streams, seconds, pairs, threads)
        head = ["streams", "rounds", "engine, tok/s", "HTTP, tok/s", "HTTP / engine", "HTTP process, µs per token"]
        lines = [cells(row) for row in rows]
        print(f"\n**{model}**\n\n{grid(head, lines)}\n", flush=True)
    print(json.dumps({"benchmark": "http", "machine": machine, "models": found}))


if __name__ == "__main__":
    typer.run(main)
