"""Does speculative decoding pay? `make bench-speculation`.

Measures: the same loaded model in three engines that take turns: without drafts, with n-gram drafts, and with drafts
made by the model with one expert. Three kinds of text at each batch: stories (a story's beginning, 160 tokens, free),
JSON (answers held to a schema of records) and code-like (answers held to a grammar of assignments and calls). Answers
are greedy and the same in all three, which is checked; new tokens over the time of the whole run, medians of runs in
turn, as a ratio to the engine without drafts. `right` is the share of accepted drafts. Ceiling: 1 + the accepted drafts
per step, as if verification were free; it is not: a step with drafts computes that many more tokens. No HTTP, no prefix
cache.

With `--verify`: the cost of a step that verifies m drafts, over one without, on a shape of `benchmarks.checkpoints`:
below 1 + m, speculation can pay.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.checkpoints import CHECKPOINTS, write_random
from benchmarks.machine import facts, introduce, use_threads
from benchmarks.tables import grid
from engine.assembly import assemble, pools
from engine.build import grammars_for, prepare
from engine.calibrate import measure
from engine.description import describe
from engine.engine import Engine
from engine.plan import Chunk
from engine.sequence import Sequence as Running
from engine.types import EngineInfo, EngineSettings, Request, Sampling
from server.requests.structured import json_rule
from weights.folder import BUNDLED
from weights.load import load_model
from weights.tokenizer import Tokenizer

ARMS = ("off", "ngram", "experts=1")
OUTPUT = 160
OPENINGS = (
    "Once upon a time, there was a little girl named Lily. She loved to play with her red ball.",
    "One day, Tom and his dog went to the park. They saw a big tree and a small bird.",
    "Tim had a toy car. The toy car was blue and very fast. Tim showed the toy car to his mom.",
    "There was a cat who liked to sleep. The cat slept on the bed and on the chair.",
)
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "friends": {"type": "array", "items": {"enum": ["Lily", "Tom", "Max"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "friends"],
    "additionalProperties": False,
}
RECORDS = "start: " + json_rule({"type": "array", "items": RECORD, "minItems": 40})
CODE = r"""start: line+
line: name " = " expression "\n" | "print(" name ")\n" | "if " name " > " NUMBER ":\n    " name " = " expression "\n"
expression: name | NUMBER | name " + " NUMBER | "len(" name ")"
name: "cat_count" | "dog_count" | "ball_size" | "story_length"
NUMBER: /[0-9]{1,3}/
"""
KINDS = {"stories": "", "JSON": RECORDS, "code-like": CODE}


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens per second, and the numbers of drafts made and accepted."""

    speed: float
    drafted: int
    accepted: int
    texts: tuple[tuple[int, ...], ...]


def run(engine: Engine, prompts: Sequence[Sequence[int]], grammar: str, count: int, ends: tuple[int, ...]) -> Run:
    budget = engine.runner.model.config.experts.budget(count)  # type: ignore[attr-defined]
    texts: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        texts[str(number)] = []
        stops = ends if grammar else ()
        sampling = Sampling(OUTPUT, seed=number, temperature=0.0, grammar=grammar, stop_token_ids=stops)
        engine.add(Request(str(number), tuple(prompt), budget, sampling))
    drafted = accepted = 0
    began = time.perf_counter()
    while engine.has_work:
        report = engine.step()
        drafted += report.stats.drafted
        accepted += report.stats.accepted
        for event in report.events:
            if event.error:
                raise RuntimeError(event.error)
            if event.token is not None:
                texts[event.request_id].append(event.token)
    seconds = time.perf_counter() - began
    tokens = sum(map(len, texts.values()))
    return Run(tokens / seconds, drafted, accepted, tuple(map(tuple, texts.values())))


def engines(folder: Path, threads: int) -> tuple[dict[str, Engine], Tokenizer]:
    """One model in an engine per source of drafts, each with the cost of a step as measured at start."""
    model, raw = load_model(folder, "auto")
    fixed: dict[str, Any] = {"model": str(folder), "threads": threads, "kv_cache_bytes": 1 << 28, "prefix_cache": False}
    native, reason = prepare(model, EngineSettings(**fixed))
    made: dict[str, Engine] = {}
    tokenizer, cost = Tokenizer.load(folder), None
    for arm in ARMS:
        settings = EngineSettings(**fixed, speculate=arm)
        engine, blocks = assemble(native, settings, grammars=grammars_for(folder, native.config, tokenizer))
        info = EngineInfo(
            family=raw["model_type"],
            parameters=0,
            kv_blocks=blocks,
            kernels_reason=reason,
            load_seconds=0.0,
            **describe(native, settings),
        )
        cost = cost or measure(engine.runner, info, pools(native.config), settings.max_step_tokens)
        engine.scheduler.cost = cost
        made[arm] = engine
    return made, tokenizer


def measured(folder: Path, count: int, batches: list[int], repeats: int, threads: int) -> list[dict[str, Any]]:
    made, tokenizer = engines(folder, threads)
    count = count or made["off"].runner.model.config.experts.trained  # type: ignore[attr-defined]
    rows = []
    for kind, grammar in KINDS.items():
        for batch in batches:
            prompts = [tokenizer.encode(_opening(number)) for number in range(batch)]
            runs: dict[str, list[Run]] = {arm: [] for arm in ARMS}
            for _ in range(repeats + 1):
                for arm, engine in made.items():
                    runs[arm].append(run(engine, prompts, grammar, count, tokenizer.eos_ids))
            if len({each.texts for done in runs.values() for each in done}) != 1:
                raise RuntimeError("speculation has changed an answer")
            for arm, done in runs.items():
                rows.append(_row(kind, batch, arm, done[1:], runs["off"][1:]))
    return rows


def _opening(number: int) -> str:
    """The opening of one of a batch's stories; each text occurs once."""
    turn, which = divmod(number, len(OPENINGS))
    return OPENINGS[which] + " And" * turn


def _row(kind: str, batch: int, arm: str, runs: list[Run], base: list[Run]) -> dict[str, Any]:
    drafted = sum(each.drafted for each in runs)
    accepted = sum(each.accepted for each in runs)
    tokens = sum(len(text) for each in runs for text in each.texts)
    return {
        "text": kind,
        "batch": batch,
        "drafts": arm,
        "tokens_per_second": median(each.speed for each in runs),
        "ratio": median(mine.speed / plain.speed for mine, plain in zip(runs, base, strict=True)),
        "drafted_per_token": drafted / tokens,
        "right": accepted / drafted if drafted else None,
    }


def verify(name: str, counts: list[int], threads: int, repeats: int = 9) -> list[dict[str, Any]]:
    """The cost of a step of one sequence that verifies m drafts, over one without drafts."""
    with tempfile.TemporaryDirectory() as place:
        write_random(CHECKPOINTS[name], Path(place))
        model, _ = load_model(Path(place), "bfloat16")
    settings = EngineSettings(model="", threads=threads, kv_cache_bytes=1 << 28)
    engine, _ = assemble(prepare(model, settings)[0], settings)
    rows = []
    for count in counts:
        budget = model.config.experts.budget(count)
        sampling = Sampling(99, seed=1, temperature=0.0)
        request = Request("a", tuple(range(3, 131)), budget, sampling)
        sequence = Running(request, 0.0)
        sequence.blocks, sequence.slot = list(range(16)), 0
        engine.runner.run((Chunk(sequence, 0, 128),))
        times: dict[int, list[float]] = {drafts: [] for drafts in (0, 1, 2, 4, 8)}
        for _ in range(repeats):
            for drafts, found in times.items():
                drafted = range(500, 500 + 700 * drafts, 700)
                chunk = Chunk(sequence, 127, 1, tuple(drafted))
                began = time.perf_counter()
                engine.runner.run((chunk,))
                found.append(time.perf_counter() - began)
        plain = median(times[0])
        for drafts, found in times.items():
            rows.append({"num_experts": count, "drafts": drafts, "cost": median(found) / plain})
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of one line of the table."""
    return [
        f"{row['text']}, {row['batch']}, {row['drafts']}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['ratio']:.2f}",
        f"{row['drafted_per_token']:.2f}",
        "–" if row["right"] is None else f"{row['right']:.0%}",
    ]


def cost_cells(row: dict[str, Any]) -> list[str]:
    """The cells of one line of the table of costs."""
    return [f"{row['num_experts']}, {row['drafts']}", f"{row['cost']:.2f}"]


def main(
    models: Annotated[list[str], typer.Option("--model", help="bundled models")] = ["infinity-stories", "topk-stories"],  # noqa: B006
    count: Annotated[int, typer.Option(help="expert count; 0: as trained")] = 0,
    batches: Annotated[list[int], typer.Option("--batch")] = [1, 8],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(help="0: all cores")] = 0,
    shape: Annotated[str, typer.Option("--verify", help="a random checkpoint; empty: none")] = "olmoe-0.9b-random",
) -> None:
    """Print a table for people and one JSON line for machines."""
    use_threads(threads)
    machine, found = facts(), {}
    introduce(machine)
    for model in models:
        rows = found[model] = measured(BUNDLED / model, count, batches, repeats, threads)
        head = ["text, batch, drafts", "tok/s", "ratio", "drafts per token", "right"]
        lines = [cells(row) for row in rows]
        print(f"\n**{model}**\n\n{grid(head, lines)}\n", flush=True)
    if shape:
        costs = found[shape] = verify(shape, [1, 2, 8], threads)
        lines = [cost_cells(row) for row in costs]
        print(f"\n**{shape}: a step with m drafts over one without**\n\n{grid(['K, m', 'cost'], lines)}\n")
    print(json.dumps({"benchmark": "speculation", "machine": machine, "models": found}))


if __name__ == "__main__":
    typer.run(main)
