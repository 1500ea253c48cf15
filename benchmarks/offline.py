"""How fast are prefill and decode, by batch and expert count, and how does `transformers` do on the same checkpoint?

Measures: `batch` prompts of 128 random tokens are prefilled (until each has its first new token), then decoded greedily
to 64 new tokens. Ours is the whole engine (scheduler, paged cache, sampler) without HTTP, prefix cache off; theirs is a
plain loop over `OlmoeForCausalLM` with its dynamic cache and `grouped_mm` experts. Both run in this process, in turn,
with the same threads; figures are medians over `--repeats`. The ceiling of decode at batch 1 is memory: the weights
that one token touches over the bandwidth printed first. Run it on an idle machine.
"""

import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
import typer

from benchmarks.checkpoints import OLMOE_900M, write_random
from engine.build import assemble, keep_freed_memory
from engine.engine import Engine
from engine.types import EngineSettings, Request, Sampling
from model.decoder import parameter_count
from weights.folder import bundled_models, resolve_model
from weights.load import load_model

PROMPT, OUTPUT = 128, 64


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of one configuration; medians."""

    model: str
    system: str
    batch: int
    num_experts: int
    prefill: float
    decode: float


Run = Callable[[int, int], tuple[float, float]]  # (batch, count) -> seconds of prefill and of decode


def prompts(batch: int, vocabulary: int) -> list[list[int]]:
    """Different random prompts; the same for every system."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, vocabulary, (batch, PROMPT), generator=generator).tolist()


def ours(folder: Path, dtype: Any) -> tuple[Run, int]:
    """A runner of whole generations on our engine, and the model's parameter count."""
    model, _ = load_model(folder, dtype)
    settings = EngineSettings(
        model=str(folder), max_step_tokens=32 * PROMPT, max_model_len=256, kv_cache_bytes=1 << 30, prefix_cache=False
    )
    engine, _ = assemble(model, settings)

    def run(batch: int, count: int) -> tuple[float, float]:
        budget = model.config.experts.budget(count)
        for number, prompt in enumerate(prompts(batch, model.config.vocabulary)):
            engine.add(Request(str(number), tuple(prompt), budget, Sampling(OUTPUT, seed=number, temperature=0.0)))
        return timed(engine, batch)

    return run, parameter_count(model)


def timed(engine: Engine, batch: int) -> tuple[float, float]:
    """Seconds until every request has its first token, and from there to the end."""
    started, first, seen = time.perf_counter(), 0.0, set()
    while engine.has_work:
        seen |= {event.request_id for event in engine.step().events}
        if not first and len(seen) == batch:
            first = time.perf_counter()
    return first - started, time.perf_counter() - first


def theirs(folder: Path, count: int) -> Run:
    """The same on transformers, reloaded with another expert count, which is the only way it has."""
    from transformers import OlmoeForCausalLM

    model = OlmoeForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, num_experts_per_tok=count, experts_implementation="grouped_mm"
    ).eval()

    @torch.inference_mode()
    def run(batch: int, _: int) -> tuple[float, float]:
        ids = torch.tensor(prompts(batch, model.config.vocab_size))
        started = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        for _ in range(OUTPUT - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        return first - started, time.perf_counter() - first

    return run


def measure(name: str, runs: dict[str, Run], batch: int, count: int, repeats: int) -> list[Speed]:
    """Median speeds of several systems, interleaved."""
    times: dict[str, list[tuple[float, float]]] = {system: [] for system in runs}
    for _ in range(repeats):
        for system, run in runs.items():
            times[system].append(run(batch, count))
    return [
        Speed(
            name,
            system,
            batch,
            count,
            batch * PROMPT / statistics.median(prefill for prefill, _ in rows),
            batch * (OUTPUT - 1) / statistics.median(decode for _, decode in rows),
        )
        for system, rows in times.items()
    ]


def bandwidth() -> float:
    """GB/s of reading one large array with all threads; the best of seven."""
    x = torch.ones(1 << 28, dtype=torch.float32)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - started)
    return x.nbytes / min(times) / 1e9


def show(speed: Speed) -> None:
    print(
        f"{speed.model:28} {speed.system:14} batch {speed.batch:3}  K {speed.num_experts:2}  "
        f"prefill {speed.prefill:8.0f}  decode {speed.decode:8.1f} tok/s",
        flush=True,
    )


def bench_model(
    name: str, folder: Path, dtype: str, batches: list[int], counts: list[int], repeats: int, peer: bool
) -> list[Speed]:
    """All batches and counts of one checkpoint."""
    run, parameters = ours(folder, dtype)
    print(f"\n{name}: {parameters / 1e6:.1f} M parameters, {dtype}")
    run(1, counts[0])  # warm up
    speeds = []
    for count in counts:
        runs = {"moedial": run} | ({"transformers": theirs(folder, count)} if peer else {})
        for batch in batches:
            speeds += measure(name, runs, batch, count, repeats)
            for speed in speeds[-len(runs) :]:
                show(speed)
        del runs
        gc.collect()
    return speeds


def transformers_version() -> str | None:
    """The peer's version, or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    return str(transformers.__version__)


def main(
    batch: Annotated[list[int], typer.Option()] = [1, 4, 16, 32],  # noqa: B006
    count: Annotated[list[int], typer.Option(help="expert counts")] = [1, 2, 4, 8],  # noqa: B006
    repeats: int = 3,
    threads: int = 0,
    bundled: Annotated[bool, typer.Option(help="also the bundled models")] = True,
    out: Annotated[Path | None, typer.Option(help="write the JSON line here as well")] = None,
) -> None:
    """Print a table for people and one JSON line for machines."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    keep_freed_memory()  # for both systems alike
    version = transformers_version()
    speeds: list[Speed] = []
    read = bandwidth()
    print(f"{torch.get_num_threads()} threads, memory read {read:.1f} GB/s, torch {torch.__version__}")
    print(f"transformers {version}" if version else "transformers is not installed: its rows are skipped")
    for name in bundled_models() if bundled else []:
        folder = resolve_model(name)
        peer = bool(version) and json.loads((folder / "config.json").read_text())["model_type"] == "olmoe"
        speeds += bench_model(name, folder, "bfloat16", batch, count, repeats, peer)
    with tempfile.TemporaryDirectory() as scratch:
        write_random(OLMOE_900M, Path(scratch))
        speeds += bench_model("olmoe-0.9b-random", Path(scratch), "bfloat16", batch, count, repeats, bool(version))
    facts = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    line = json.dumps(facts | {"memory_gb_s": read, "torch": torch.__version__, "rows": [asdict(s) for s in speeds]})
    print(line)
    if out is not None:
        out.write_text(line + "\n")


if __name__ == "__main__":
    typer.run(main)
