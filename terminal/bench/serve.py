"""`moedial bench serve`: loads a running server with a mix of expert counts and reports what its clients measure.

TTFT: from sending a request to the first text. ITL: between two reads of one stream that brought text; a read may bring
several tokens, so that tokens are counted by the server's usage. Whole: to the end of the stream. Stream tok/s: tokens
after the first over the time from the first text to the last. tok/s: all tokens of a row over the time of the run; it
grows with the row's share of the mix. Failed requests are counted by reason and are in no other figure.

Limits of measuring at a client: the figures include the connection, and the set-up of new ones; this process is one
event loop on one core, some thousand events a second (docs/terminal.md), which it shares with a server on the same
machine: `busy` is its share of a core. With --concurrency a slow server gets fewer requests, so that its tail looks
better than to users who arrive independently: --rate is for that. The end of a run, with few requests left, counts.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from typing import Any

import orjson
import typer

from terminal.bench import figures, plot, table
from terminal.bench.figures import FiguresRow
from terminal.bench.load import LoadGenerator, RunResult
from terminal.bench.mix import parse_mix
from terminal.bench.plan import PlannedRequest, check_rate, parse_lengths, plan
from terminal.bench.prompts import Prompt, PromptSource
from terminal.connection import Server
from terminal.counts import request_fields
from terminal.errors import BadOption, TerminalError
from terminal.models import chosen
from terminal.options import INTERRUPTED, LoadOptions

CONCURRENCY = 8
OWN_FIELDS = ("url", "model", "key", "json", "plot")  # not in the settings of the JSON line


def run(options: LoadOptions) -> int:
    """Print a table and one JSON line; returns the exit status, which is 130 after Ctrl-C.

    Raises:
        BadOption: an option is invalid.
        TerminalError: no server, or half of the requests failed.
        KeyboardInterrupt: Ctrl-C before a request had ended.
    """
    if options.rate is None and options.concurrency is None:
        options = replace(options, concurrency=CONCURRENCY)
    shares, lengths = parse_mix(options.mix), parse_lengths(options.prompt_tokens) if options.prompt_tokens else None
    _check(options)
    with closing(Server(options.url, options.key, options.timeout)) as server:
        model = options.model or chosen(server.models(), "").id
        prompts = PromptSource.prepare(server, model, options.prompts, lengths is not None, options.endpoint == "chat")
        generator = LoadGenerator(
            server.url, options.key, options.endpoint, options.timeout, options.concurrency or CONCURRENCY
        )
        first = plan(shares, options.warmup, options.seed, lengths, None, "warmup")
        warm = _send(generator, options, first, prompts, "warming up")
        requests = plan(shares, options.requests, options.seed, lengths, options.rate)
        result = RunResult() if warm.unfinished else _send(generator, options, requests, prompts, "measuring")
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


def _send(
    generator: LoadGenerator, options: LoadOptions, requests: list[PlannedRequest], prompts: PromptSource, stage: str
) -> RunResult:
    bodies = [body(options, prompts.model, request, prompts.of(request)) for request in requests]
    with _progress(stage, len(requests)) as on_end:
        return generator.run(requests, bodies, on_end)


def body(options: LoadOptions, model: str, request: PlannedRequest, prompt: Prompt) -> dict[str, Any]:
    """The body of one request."""
    given: dict[str, Any] = {"prompt": prompt}
    if options.endpoint == "chat":
        given = {"messages": [{"role": "user", "content": prompt}]}
    return {
        "model": model,
        **given,
        **request_fields(request.count),
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": request.seed,
        **({"ignore_eos": True} if options.ignore_eos else {}),
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@contextmanager
def _progress(stage: str, total: int) -> Iterator[Callable[[], None]]:
    """Show progress on standard error, at a terminal only."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal or not total) as progress:
        task = progress.add_task(stage, total=total)
        yield lambda: progress.advance(task)


def _report(options: LoadOptions, url: str, model: str, result: RunResult, warm: RunResult) -> None:
    rows = figures.rows(result)
    record = _record(options, url, model, result, warm, rows)
    line = orjson.dumps(record).decode()
    total = f"{rows[-1]['tokens_per_second']:,.0f} tokens/s in all"
    title = f"{model}: {total}, {len(result.outcomes)} requests in {result.seconds:.1f} s"
    table.show(rows, title, record["error_examples"], figures.warnings(result, warm))
    typer.echo(line)
    if options.json is not None:
        try:
            options.json.write_text(line + "\n")
        except OSError as error:
            raise TerminalError(f"--json {options.json}: {error.strerror}") from None
    if options.plot is not None:
        plot.draw(result, options.plot, title)


def _check_failures(total: FiguresRow) -> None:
    """Raises TerminalError where half of the requests failed: their figures say little about the server's speed."""
    failed = total["requests"] - total["ok"]
    if failed == total["requests"]:
        raise TerminalError("no request went well")
    if 2 * failed >= total["requests"]:
        raise TerminalError(f"{failed} of {total['requests']} requests failed")


def _record(
    options: LoadOptions, url: str, model: str, result: RunResult, warm: RunResult, rows: list[FiguresRow]
) -> dict[str, Any]:
    """The JSON line: the settings that repeat the run, and every figure. Never the key."""
    settings = {name: value for name, value in asdict(options).items() if name not in OWN_FIELDS}
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
