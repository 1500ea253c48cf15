"""Does every count lower the loss and the speed, over HTTP? `make bench-dial-http`.

Measures: `moedial serve` on loopback scores a text at each count (`/v1/completions` with `echo`, `logprobs` and
`max_tokens: 0`), and streams answers one after the other, the counts in turns, so that a slow spell of the machine hits
all of them; the median of the server's own `tokens_per_second`. Ceiling: the loss at the largest count, and the speed
at one expert. The command fails where a loss does not fall, or a speed does not, from one count to the next.
"""

import json
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import typer

from benchmarks.http import server
from benchmarks.machine import facts, introduce
from benchmarks.tables import grid
from weights.folder import compared_models

COUNTS = (1, 2, 4, 8)
STORIES = Path(__file__).parent.parent / "tests" / "e2e" / "stories.txt"
OUTPUT = 128
PROMPT = "Once upon a time, there was a little girl named Lily."


def complete(port: int, **body: Any) -> dict[str, Any]:
    """One completion."""
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=600).raise_for_status()
    return dict(answer.json())


def loss(port: int, texts: list[str], count: int) -> float:
    """Nats per token of the texts, without the first token of each."""
    values: list[float] = []
    for text in texts:
        answer = complete(port, prompt=text, max_tokens=0, echo=True, logprobs=0, num_experts=count)
        values += answer["choices"][0]["logprobs"]["token_logprobs"][1:]
    return -sum(values) / len(values)


def speed(port: int, count: int, seed: int) -> float:
    """Tokens per second of one stream, as the server reports it."""
    answer = complete(
        port, prompt=PROMPT, max_tokens=OUTPUT, ignore_eos=True, temperature=0.7, seed=seed, num_experts=count
    )
    return float(answer["metrics"]["tokens_per_second"])


def rows_of(model: str, texts: list[str], rounds: int, threads: int) -> list[dict[str, Any]]:
    """Loss and speed of one model at each count."""
    flags = ["--threads", str(threads), "--log-level", "error", "--no-prefix-cache"]
    speeds: dict[int, list[float]] = {count: [] for count in COUNTS}
    with server(model, flags) as (port, _):
        losses = {count: loss(port, texts, count) for count in COUNTS}
        for seed in range(rounds):
            for count in COUNTS:
                speeds[count].append(speed(port, count, seed))
    return [
        {
            "model": model,
            "num_experts": count,
            "loss": round(losses[count], 4),
            "tokens_per_second": round(median(speeds[count]), 1),
        }
        for count in COUNTS
    ]


def falls(rows: list[dict[str, Any]]) -> bool:
    """Whether loss and speed of one model fall from each count to the next."""
    return all(
        more["loss"] < fewer["loss"] and more["tokens_per_second"] < fewer["tokens_per_second"]
        for fewer, more in pairwise(rows)
    )


def main(
    text: Annotated[Path, typer.Option(help="Held-out text, its documents apart by empty lines")] = STORIES,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    threads: Annotated[int, typer.Option(help="0: all cores")] = 0,
) -> None:
    """Print a table for people and one JSON line for machines."""
    machine = facts()
    introduce(machine)
    texts = text.read_text().strip().split("\n\n")
    found = {model: rows_of(model, texts, rounds, threads) for model in compared_models()}
    rows = [row for each in found.values() for row in each]
    cells = [[f"{row['model']}, {row['num_experts']}", str(row["loss"]), str(row["tokens_per_second"])] for row in rows]
    print(grid(("model, K", "loss", "tokens/s"), cells))
    verdicts = {model: falls(each) for model, each in found.items()}
    print(json.dumps(machine | {"rows": rows, "falls": verdicts}))
    raise typer.Exit(0 if all(verdicts.values()) else 1)


if __name__ == "__main__":
    typer.run(main)
