"""`moedial bench serve`: loads a running server with a mix of expert counts and says what its clients saw.

TTFT: from sending a request to the first text. ITL: between two reads of one stream that brought text; a read may bring
several tokens, so tokens are counted by the server's usage. Whole: to the end of the stream. Stream tok/s: tokens
after the first over the time from the first text to the last. tok/s: all tokens of a row over the time of the run; it
grows with the row's share of the mix. Failed requests are counted by reason and are in no other figure.

Limits of measuring at a client: the connection is in it, new ones with their set-up; this process is one event loop on
one core, some thousand events a second (docs/terminal.md), which it shares with a server on the same machine: `busy` is
its share of a core. With --concurrency a slow server is sent fewer requests, so its tail looks better than what people
who arrive by themselves would see: that is what --rate is for. A run's end, when few requests are left, is in tok/s.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from typing import Any

import orjson
import typer

from terminal.bench import figures, plot, table
from terminal.bench.figures import Row
from terminal.bench.load import Load, Run
from terminal.bench.mix import parse_mix
from terminal.bench.plan import Job, check_rate, parse_lengths, plan
from terminal.bench.prompts import Prompt, Prompts
from terminal.connection import Server
from terminal.counts import request_fields
from terminal.errors import BadOption, TerminalError
from terminal.models import chosen
from terminal.options import INTERRUPTED, LoadOptions

CONCURRENCY = 8
ELSEWHERE = ("url", "model", "key", "json", "plot")  # not among the settings of the JSON line


def run(options: LoadOptions) -> int:
    """Prints a table and one JSON line; the exit status, after Ctrl-C 130.

    Raises:
        BadOption: an option that cannot be done.
        TerminalError: no server, or half of the requests failed.
        KeyboardInterrupt: Ctrl-C before a request had ended.
    """
    if options.rate is None and options.concurrency is None:
        options = replace(options, concurrency=CONCURRENCY)
    shares, lengths = parse_mix(options.mix), parse_lengths(options.prompt_tokens) if options.prompt_tokens else None
    _check(options)
    with closing(Server(options.url, options.key, options.timeout)) as server:
        model = options.model or chosen(server.models(), "").id
        prompts = Prompts.prepare(server, model, options.prompts, lengths is not None, options.endpoint == "chat")
        load = Load(server.url, options.key, options.endpoint, options.timeout, options.concurrency or CONCURRENCY)
        first = plan(shares, options.warmup, options.seed, lengths, None, "warmup")
        warm = _send(load, options, first, prompts, "warming up")
        jobs = plan(shares, options.requests, options.seed, lengths, options.rate)
        result = Run() if warm.unfinished else _send(load, options, jobs, prompts, "measuring")
    if not result.outcomes:
        raise KeyboardInterrupt
    _report(options, server.url, model, result, warm)
    if result.unfinished:
        return INTERRUPTED
    _check_failures(figures.row("all", result.outcomes, result.seconds))
    return 0


def _check(options: LoadOptions) -> None:
    check_rate(options.rate, options.concurrency)
    if not (math.isfinite(options.timeout) and options.timeout > 0):
        raise BadOption(f"--timeout must be more than 0 seconds, got {options.timeout:g}")
    for path in (options.json, options.plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise BadOption(f"{path}: there is no such folder")
    if options.plot is not None:
        plot.check(options.plot)


def _send(load: Load, options: LoadOptions, jobs: list[Job], prompts: Prompts, stage: str) -> Run:
    bodies = [body(options, prompts.model, job, prompts.of(job)) for job in jobs]
    with _progress(stage, len(jobs)) as on_end:
        return load.run(jobs, bodies, on_end)


def body(options: LoadOptions, model: str, job: Job, prompt: Prompt) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": prompt}]} if options.endpoint == "chat" else {"prompt": prompt}
    return {
        "model": model,
        **asked,
        **request_fields(job.count),
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": job.seed,
        **({"ignore_eos": True} if options.ignore_eos else {}),
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@contextmanager
def _progress(stage: str, total: int) -> Iterator[Callable[[], None]]:
    """On standard error, and only where somebody looks."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal or not total) as progress:
        task = progress.add_task(stage, total=total)
        yield lambda: progress.advance(task)


def _report(options: LoadOptions, url: str, model: str, result: Run, warm: Run) -> None:
    rows = figures.rows(result)
    record = _record(options, url, model, result, warm, rows)
    line = orjson.dumps(record).decode()
    total = f"{rows[-1]['tokens_per_second']:,.0f} tokens/s in all"
    title = f"{model}: {total}, {len(result.outcomes)} requests in {result.seconds:.1f} s"
    table.show(rows, title, record["error_examples"], figures.doubts(result, warm))
    typer.echo(line)
    if options.json is not None:
        try:
            options.json.write_text(line + "\n")
        except OSError as error:
            raise TerminalError(f"--json {options.json}: {error.strerror}") from None
    if options.plot is not None:
        plot.draw(result, options.plot, title)


def _check_failures(everything: Row) -> None:
    """A run of which half failed says little about the server's speed, and a script is to notice."""
    failed = everything["requests"] - everything["ok"]
    if failed == everything["requests"]:
        raise TerminalError("no request went well")
    if 2 * failed >= everything["requests"]:
        raise TerminalError(f"{failed} of {everything['requests']} requests failed")


def _record(options: LoadOptions, url: str, model: str, result: Run, warm: Run, rows: list[Row]) -> dict[str, Any]:
    """The line for machines: how to repeat the run, and every figure. Never the key."""
    settings = {name: value for name, value in asdict(options).items() if name not in ELSEWHERE}
    return {
        "bench": "serve",
        "url": url,
        "model": model,
        "settings": settings | {"prompts": None if options.prompts is None else str(options.prompts)},
        "unfinished": result.unfinished,
        "seconds": round(result.seconds, 3),
        "requests_per_second": round(rows[-1]["ok"] / result.seconds, 3),
        "busy": round(result.busy, 3),
        "error_examples": figures.examples(result.outcomes),
        "warmup_errors": figures.errors(warm.outcomes),
        "all": rows[-1],
        "by_count": rows[:-1],
    }
