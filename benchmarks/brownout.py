"""What does `--brownout` save when twice as much is asked as can be done? `make bench-brownout`.

Measures a real server over loopback, a process of its own for each arm, with streams that name no expert count: about
20 tokens in, 128 out, every token an event. First what is to be compared with: one stream after the other (unloaded),
and as many clients as the batch has slots, each sending its next request when the last one has ended (capacity). A
share of that is called the sustainable load; an arm of it shows that it is. Then twice that, at moments of a seeded
Poisson process, without and with `--brownout`: time between tokens against unloaded, the share of requests answered,
the queue, the counts that ran. All of an arm counts, also its first seconds.

Ceiling: the capacity at the cheapest count that the quality floor allows. Where that is less than twice the
sustainable load, brownout cannot hold either. The clients run on the same cores as the server.
"""

import asyncio
import time
from collections import Counter
from contextlib import suppress
from typing import Annotated, Any

import numpy
import typer

from benchmarks.http import server
from benchmarks.machine import facts, introduce
from benchmarks.open_loop import Sent, closed_loop, moments, open_loop, queue_length
from benchmarks.results import Out, finish
from benchmarks.tables import grid
from weights.calibration import FILE, checkpoint_hash, read
from weights.folder import resolve_model

OUTPUT = 128
WARM_SECONDS, IDLE_SECONDS = 3.0, 8.0  # before an arm: an unloaded server is known, and stands at its default again
WORDS = ("cat", "dog", "bird", "tree", "boy", "girl", "house", "river", "friend", "boat", "star", "hat", "cake", "ball")
Figures = dict[str, Any]


def body(number: int) -> Figures:
    """A request that names no count; every prompt is another one."""
    first, second, third = (WORDS[number // len(WORDS) ** place % len(WORDS)] for place in range(3))
    prompt = f"Once upon a time there was a {first} that had a {second} and wanted a {third}."
    return {"prompt": prompt, "max_tokens": OUTPUT, "ignore_eos": True, "temperature": 0.7, "seed": number}


def at_count(count: int) -> Any:
    """The same with a count."""
    return lambda number: body(number) | {"num_experts": count}


def figures(sent: list[Sent], waiting: list[int]) -> Figures:
    """What one arm has shown, up to its last token; latencies in milliseconds."""
    whole = [one for one in sent if one.finished and one.usage.get("completion_tokens") == OUTPUT]
    gaps = [gap * 1000 for one in sent for gap in one.gaps] or [0.0]
    waits = [one.wait * 1000 for one in whole] or [0.0]
    seconds = max((one.tokens[-1] for one in sent if one.tokens), default=sent[0].at) - sent[0].at
    counts = Counter(f"{one.usage.get('num_experts', 0):g}" for one in whole)
    return {
        "sent": len(sent),
        "answered": len(whole) / len(sent),
        "refused": sum(one.status not in (0, 200) for one in sent),
        "requests_per_second": len(whole) / seconds if seconds else 0.0,
        "itl_p50_ms": float(numpy.percentile(gaps, 50)),
        "itl_p95_ms": float(numpy.percentile(gaps, 95)),
        "first_token_p50_ms": float(numpy.percentile(waits, 50)),
        "first_token_p95_ms": float(numpy.percentile(waits, 95)),
        "longest_queue": max(waiting, default=0),
        "counts": {count: counts[count] for count in sorted(counts, key=float, reverse=True)},
    }


async def watched(port: int, work: Any) -> Figures:
    """The figures of an arm, with the queue looked at meanwhile."""
    waiting: list[int] = []
    watch = asyncio.create_task(queue_length(port, 0.25, waiting))
    sent = await work
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch
    return figures(sent, waiting)


def arm(model: str, flags: list[str], rate: float, seconds: float) -> Figures:
    """An open loop of `rate` requests a second against a fresh server."""
    times = moments(rate, seconds)
    with server(model, flags) as (port, _):
        asyncio.run(closed_loop(port, body, 1, WARM_SECONDS))  # thrown away
        time.sleep(IDLE_SECONDS)
        return asyncio.run(watched(port, open_loop(port, body, times))) | {"rate": rate}


def reference(model: str, flags: list[str], slots: int, seconds: float, cheapest: int) -> dict[str, Figures]:
    """Unloaded; the capacity at the default count, and at the cheapest count that the floor allows."""
    found = {}
    with server(model, flags) as (port, _):
        asyncio.run(closed_loop(port, body, 1, WARM_SECONDS))  # thrown away
        found["unloaded"] = asyncio.run(watched(port, closed_loop(port, body, 1, seconds / 2)))
        for name, bodies in (("capacity", body), (f"capacity at K = {cheapest}", at_count(cheapest))):
            found[name] = asyncio.run(watched(port, closed_loop(port, bodies, slots, seconds)))
    return found


def cheapest_count(model: str, floor: float) -> int:
    """The smallest uniform count of the calibration that has the quality."""
    folder = resolve_model(model)
    options = read(folder / FILE, checkpoint_hash(folder)).options
    return min(option.counts[0] for option in options if option.budget.uniform and option.quality.relative >= floor)


def table(arms: dict[str, Figures]) -> str:
    """A line per arm; latencies against unloaded in brackets."""
    base = arms["unloaded"]["itl_p95_ms"]
    head = [
        "",
        "asked, 1/s",
        "answered",
        "refused",
        "ITL p50, ms",
        "ITL p95, ms",
        "first token p95, ms",
        "queue",
        "K ran",
    ]
    lines = []
    for name, row in arms.items():
        counts = ", ".join(f"{count}: {number}" for count, number in row["counts"].items())
        p50, p95 = f"{row['itl_p50_ms']:.1f}", f"{row['itl_p95_ms']:.1f} ({row['itl_p95_ms'] / base:.2f} ×)"
        asked = f"{row['rate']:.2f}" if "rate" in row else "–"
        answered, first = f"{row['answered']:.0%}", f"{row['first_token_p95_ms']:,.0f}"
        lines.append([name, asked, answered, str(row["refused"]), p50, p95, first, str(row["longest_queue"]), counts])
    return grid(head, lines)


def main(
    model: Annotated[str, typer.Option(help="bundled, or a folder; with a calibration")] = "infinity-stories",
    slots: Annotated[int, typer.Option(help="--max-running of the server")] = 4,
    default: Annotated[int, typer.Option(help="expert count of requests that name none; 0: as trained")] = 8,
    quality: Annotated[float, typer.Option(help="--brownout-quality")] = 0.9,
    share: Annotated[float, typer.Option(help="of the capacity, that is called sustainable")] = 0.8,
    times: Annotated[float, typer.Option(help="the sustainable load, that is asked")] = 2.0,
    seconds: Annotated[float, typer.Option(help="of each arm")] = 60.0,
    queue_timeout: Annotated[float, typer.Option(help="--queue-timeout of the server, in seconds")] = 5.0,
    out: Out = None,
) -> None:
    """Print a table for people and one JSON line for machines."""
    machine = facts()
    introduce(machine)
    flags = ["--max-running", str(slots), "--queue-timeout", str(queue_timeout), "--stream-interval-ms", "0"]
    flags += ["--default-num-experts", str(default), "--no-prefix-cache", "--log-level", "error"]
    lowered = ["--brownout", "--brownout-quality", str(quality)]
    arms = reference(model, flags, slots, seconds / 2, cheapest_count(model, quality))
    sustainable = share * arms["capacity"]["requests_per_second"]
    arms["sustainable load"] = arm(model, flags, sustainable, seconds)
    arms[f"{times:g} × that, without"] = arm(model, flags, times * sustainable, seconds)
    arms[f"{times:g} × that, --brownout"] = arm(model, flags + lowered, times * sustainable, seconds)
    print(f"\n**{model}**, {slots} slots, quality floor {quality:g}\n\n{table(arms)}\n")
    finish({"benchmark": "brownout", "machine": machine, "model": model, "flags": flags, "arms": arms}, out)


if __name__ == "__main__":
    typer.run(main)
