"""How fast is decoding after long prompts, on our engine and on llama.cpp? `make bench-long`.

Measures: one prompt is computed from length to length, which gives prefill (of the whole prompt, batch 1); at each
length its cache is copied for other sequences, so that each reads its own, and some tokens are decoded with one
sequence and with several: medians of the steps. Both sides do the same, each in steps of at most 2,048 tokens of the
prompt. The model is a quarter of the 0.9 B OLMoE shape in every part (2 layers of 8, a quarter of the vocabulary), so
that a prompt of 32k tokens takes minutes and not a quarter of an hour; what a step costs beside its layers counts four
times as much here. In each of `--repeats` rounds every system takes its turn with all of this; figures are medians over
the rounds, and the JSON line has every round's as well. The ceiling of decoding is memory: the weights that a step
touches and the whole cache, over the bandwidth measured first. Ours counts the experts that several sequences touch;
without it there is a ceiling of one sequence alone. Run it on an idle machine.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the server sets it for its engine

import torch
import typer

from benchmarks.checkpoints import LONG, write_random
from benchmarks.machine import facts, introduce, use_threads
from benchmarks.peers import LLAMACPP, installed, python
from benchmarks.results import Out, finish
from benchmarks.rounds import Rounds, figures
from benchmarks.systems.llamacpp import BINARIES, WEIGHTS, Kind, architecture, as_file, call, scratch
from benchmarks.systems.long_ours import measure
from benchmarks.systems.ours import OurEngine
from benchmarks.systems.system import LongRates, PeerFailed
from benchmarks.tables import grid, titled
from benchmarks.touched import step_bytes
from engine.memory import keep_freed_memory
from model.backends.cpu.kernels.library import load
from model.shapes.decoder import DecoderConfig
from model.shapes.memory import bytes_per_block
from weights.config import read_config

DRIVER = Path(__file__).parent / "systems" / "long_driver.py"
COUNT = LONG["num_experts_per_tok"]
ELEMENT = {"auto": (2, 0), "int8": (1, 4)}  # bytes of a cached element, and of a scale
Measure = Callable[[Path, Sequence[int], Sequence[int], int], list[LongRates]]


@dataclass(frozen=True, slots=True)
class Way:
    """One system, how it stores weights and what it keeps of tokens."""

    name: str
    weights: str
    ours: bool
    measure: Measure
    cache: str = "auto"


def ours(name: str, quantize: str = "none", cache: str = "auto") -> Way:
    """Our engine with weights as its benchmarks name them, and a cache as its option does."""
    everywhere, _, kind = quantize.rpartition(":")
    settings = {"quantize": kind, "quantize_layers": everywhere or "experts", "kv_cache_dtype": cache}

    def run(folder: Path, contexts: Sequence[int], batches: Sequence[int], steps: int) -> list[LongRates]:
        return measure(folder, contexts, batches, steps, COUNT, **settings)

    return Way(name, OurEngine(quantize).weights, True, run, cache)


def theirs(kind: Kind) -> Way:
    """llama.cpp with weights of this kind; its cache is float16."""

    def run(folder: Path, contexts: Sequence[int], batches: Sequence[int], steps: int) -> list[LongRates]:
        file = as_file(folder, kind)
        settings = {
            "source": str(LLAMACPP / "source"),
            "libraries": str(BINARIES),
            "file": str(file),
            "experts": {f"{architecture(file)}.expert_used_count": COUNT},
            "contexts": list(contexts),
            "batches": list(batches),
            "steps": steps,
            "threads": torch.get_num_threads(),
        }
        said = call([python(LLAMACPP), DRIVER, json.dumps(settings)])
        return [LongRates(**json.loads(line)) for line in said.splitlines() if line.startswith('{"context"')]

    return Way(f"llama.cpp {kind}", WEIGHTS[kind], False, run)


WAYS = {
    "bf16": ours("moedial"),
    "int8": ours("moedial all:int8", "all:int8"),
    "int4": ours("moedial int4", "int4"),
    "all:int4": ours("moedial all:int4", "all:int4"),
    "kv-int8": ours("moedial, cache int8", cache="int8"),
    "all:int8-kv-int8": ours("moedial all:int8, cache int8", "all:int8", "int8"),
    **{f"llamacpp-{kind}": theirs(kind) for kind in WEIGHTS},
}
DEFAULT = "bf16,int8,int4,kv-int8,llamacpp-bf16,llamacpp-q8_0,llamacpp-q4_0"


Key = tuple[int, int]  # context, batch


def measured(ways: Sequence[Way], call: Callable[[Way], list[LongRates]], rounds: Rounds) -> dict[Way, list[LongRates]]:
    """Measure every system in turn, in each round; one that fails is left out of the rounds after."""
    found: dict[Way, list[LongRates]] = {}
    able = list(ways)
    for _ in rounds:
        for way in list(able):
            try:
                found.setdefault(way, []).extend(call(way))
            except PeerFailed as error:
                print(f"{way.name} is out: {error}", flush=True)
                able.remove(way)
    return found


def rows_of(found: Mapping[Way, Sequence[LongRates]], config: DecoderConfig, read: float) -> list[dict[str, Any]]:
    """A line of the result for each system, length and batch."""
    touched: dict[Key, float] = {}
    by_way: dict[tuple[Way, Key], list[LongRates]] = {}
    for way, runs in found.items():
        for run in runs:
            by_way.setdefault((way, (run.context, run.batch)), []).append(run)
            if run.touched is not None:
                touched.setdefault((run.context, run.batch), run.touched)
    rows = []
    for (way, key), runs in by_way.items():
        own = runs[0].touched
        rows.append(row(way, key, runs, config, touched.get(key) if own is None else own, read))
    return rows


def row(
    way: Way, key: Key, runs: Sequence[LongRates], config: DecoderConfig, touched: float | None, read: float
) -> dict[str, Any]:
    """One line of the result: speeds, and the bytes of a decoding step with the speed that memory allows. Both are None
    where the experts that several sequences touch were not counted."""
    context, batch = key
    about = {"system": way.name, "weights": way.weights, "file": "", "ours": way.ours, "context": context}
    speeds = {"batch": batch} | figures(runs)
    if touched is None and batch > 1:
        return about | speeds | {"gigabytes": None, "ceiling": None}
    element, scale = ELEMENT[way.cache]
    cached = batch * context * bytes_per_block(config.memory, 1, element, scale)
    gigabytes = (step_bytes(config, way.weights, touched, COUNT, own=way.ours) + cached) / 1e9
    return about | speeds | {"gigabytes": gigabytes, "ceiling": batch * read / gigabytes}


def show(way: Way, runs: Sequence[LongRates]) -> None:
    """Print one line per measurement, so that a long run can be watched."""
    for run in runs:
        print(
            f"{way.name:28} context {run.context:6}  batch {run.batch:2}  prefill {run.prefill:7.0f}  "
            f"decode {run.decode:7.1f} tok/s",
            flush=True,
        )


def shares(rows: Sequence[dict[str, Any]]) -> str:
    """The table of decoding as a share of what memory allows; a dash where that is not known."""
    names = list(dict.fromkeys(row["system"] for row in rows))
    by_key: dict[Key, dict[str, str]] = {}
    for row in rows:
        share = f"{100 * row['decode'] / row['ceiling']:.0f} %" if row["ceiling"] else "–"
        by_key.setdefault((row["context"], row["batch"]), {})[row["system"]] = share
    cells = [
        [f"{context:,}, {batch}", *(found.get(name, "–") for name in names)]
        for (context, batch), found in sorted(by_key.items())
    ]
    return grid(["context, batch", *names], cells)


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Decoding by length and batch, the same as a share of what memory allows, and prefill by length."""
    first = min(row["batch"] for row in rows)
    alone = [row for row in rows if row["batch"] == first]
    parts = [
        titled("decode", rows, "decode", ("context", "batch")),
        f"**decode, of what memory allows**\n\n{shares(rows)}",
        titled("prefill, batch 1", alone, "prefill", ("context",)),
    ]
    return "\n\n".join(parts)


def numbers(text: str, option: str, most: int) -> list[int]:
    """The numbers of an option, rising. Raises BadParameter."""
    found = []
    for word in text.split(","):
        if not word.strip().isdigit() or not 1 <= int(word) <= most:
            raise typer.BadParameter(f"{option}: {word!r} is no number from 1 to {most}")
        found.append(int(word))
    return sorted(set(found))


def ways_of(text: str) -> list[Way]:
    """The systems of the option, ours first: they count the experts that a step touches. Without llama.cpp where it is
    not installed. Raises BadParameter, and SystemExit where ours would run on torch."""
    for word in text.split(","):
        if word not in WAYS:
            raise typer.BadParameter(f"--systems: {word!r} is none of {', '.join(WAYS)}")
    found = [WAYS[word] for word in dict.fromkeys(text.split(","))]
    if any(way.ours for way in found) and not load().native:
        raise SystemExit(f"no native kernels: {load().reason}")
    if installed(LLAMACPP):
        return sorted(found, key=lambda way: not way.ours)
    print("llama.cpp is skipped: not installed (make bench-peers)", flush=True)
    return [way for way in found if way.ours]


def main(
    contexts: Annotated[str, typer.Option(help="tokens of the prompt, with commas between")] = "1024,4096,16384,32768",
    batches: Annotated[str, typer.Option(help="sequences, with commas between")] = "1,8",
    systems: Annotated[str, typer.Option(help=f"of {', '.join(WAYS)}")] = DEFAULT,
    steps: Annotated[int, typer.Option(min=1, max=64, help="decoded at each length")] = 12,
    repeats: Annotated[int, typer.Option(min=1, help="rounds, with all systems in turn")] = 1,
    minutes: Annotated[float, typer.Option(help="after so many, no further round begins")] = 600,
    threads: int = 0,
    keep: Annotated[Path | None, typer.Option(help="a folder for the model and its files, used again")] = None,
    out: Out = None,
) -> None:
    """Print tables for people and one JSON line for machines."""
    most = LONG["max_position_embeddings"] - 64
    lengths, sizes = numbers(contexts, "--contexts", most), numbers(batches, "--batches", 64)
    ways = ways_of(systems)
    use_threads(threads)
    keep_freed_memory()
    values = facts()
    introduce(values)
    folder = scratch(keep) / "olmoe-quarter"
    if not (folder / "tokenizer_config.json").exists():
        write_random(LONG, folder)

    def measure_and_show(way: Way) -> list[LongRates]:
        runs = way.measure(folder, lengths, sizes, steps)
        show(way, runs)
        return runs

    found = measured(ways, measure_and_show, Rounds(repeats, minutes))
    rows = rows_of(found, read_config(folder)[0], values["memory_gb_s"])
    print(f"\n{report(rows)}\n")
    finish(values | {"model": LONG, "rows": rows}, out)


if __name__ == "__main__":
    typer.run(main)
