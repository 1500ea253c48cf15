"""How fast are prefill and decode, by batch and expert count, on our engine and on its peers?

Measures: `batch` prompts of 128 random tokens are prefilled (until each has its first new token), then decoded
greedily to 64 new tokens; same checkpoint, prompts, lengths and number of threads for every system, as far as it lets
itself be told (`benchmarks/systems/` says where not). moedial and transformers run in this process, vLLM and
llama.cpp in their own; in each of `--repeats` rounds every system takes its turn with all batches, so that a slow spell
of the machine hits all of them. Figures are medians over the rounds; the JSON line has every round's as well. Ratios
are taken between systems that store weights alike. The ceiling of decode at batch 1 is memory: the weights that one
token touches over the bandwidth measured first. Run it on an idle machine.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the server sets it for its engine

import typer

from benchmarks.checkpoints import CHECKPOINTS, RANDOM, write_random
from benchmarks.machine import facts, introduce, use_threads
from benchmarks.results import Out, finish, write
from benchmarks.rounds import Rounds, figures
from benchmarks.systems.hugging_face import Transformers
from benchmarks.systems.ik_llamacpp import IK_WEIGHTS, IkLlamaCpp
from benchmarks.systems.llamacpp import WEIGHTS, Kind, LlamaCpp, scratch
from benchmarks.systems.ours import OurEngine, OurFile
from benchmarks.systems.system import PeerFailed, Rates, Session, System
from benchmarks.systems.vllm_cpu import Vllm
from benchmarks.tables import grid, model_tables
from benchmarks.touched import step_bytes
from engine.memory import keep_freed_memory
from weights.config import read_config
from weights.folder import compared_models, read_json, resolve_model

PEERS: dict[str, list[System]] = {
    "transformers": [Transformers()],
    "llamacpp": [LlamaCpp("bf16"), LlamaCpp("q8_0")],
    "vllm": [Vllm()],
    "vllm-compiled": [Vllm(eager=False)],
    "ik_llamacpp": [IkLlamaCpp(kind) for kind in IK_WEIGHTS],
    **{f"llamacpp-{kind}": [LlamaCpp(kind)] for kind in WEIGHTS},
    **{f"ik_llamacpp-{kind}": [IkLlamaCpp(kind)] for kind in IK_WEIGHTS},
}
FILES: dict[str, Kind] = {"q8_0": "q8_0", "q4_0": "q4_0", "q4_k_m": "q4_k_m"}
DEFAULT = "transformers,llamacpp,vllm"


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of one configuration: medians, and each round's."""

    model: str
    system: str
    weights: str
    file: str
    ours: bool
    batch: int
    num_experts: int
    prefill: float
    decode: float
    runs: list[dict[str, float]]
    touched: float | None


def checkpoints(names: Sequence[str], scratch: Path) -> Iterator[tuple[str, Path]]:
    """Bundled models and folders as they are; random ones are written first."""
    for name in names:
        folder = scratch / name
        if name in RANDOM:
            if not (folder / "tokenizer_config.json").exists():  # the last that is written
                write_random(RANDOM[name], folder)
            yield name, folder
        else:
            yield Path(name).name, resolve_model(name)


def able(systems: Sequence[System], folder: Path) -> list[System]:
    """The systems that can run this checkpoint; prints why the others cannot."""
    config = read_json(folder / "config.json")
    reasons = {system.name: system.refuses(config) for system in systems}
    for name, reason in reasons.items():
        if reason:
            print(f"{name} is skipped: {reason}", flush=True)
    return [system for system in systems if not reasons[system.name]]


def opened(systems: Sequence[System], folder: Path, count: int, stack: ExitStack) -> dict[System, Session]:
    """Load all systems at one count; they are closed with the stack."""
    sessions = {}
    for system in systems:
        try:
            sessions[system] = stack.enter_context(system.open(folder, count))
        except PeerFailed as error:
            print(f"{system.name} is skipped at K = {count}: {error}", flush=True)
    return sessions


def repeated(
    sessions: dict[System, Session], batches: Sequence[int], rounds: Rounds
) -> dict[tuple[System, int], list[Rates]]:
    """Measure every system in turn, warmed up, in each round; one that fails is left out of the rounds after."""
    rates: dict[tuple[System, int], list[Rates]] = {}
    for _ in rounds:
        for system, session in list(sessions.items()):
            try:
                session.warm_up()
                for batch, rate in session.run(batches).items():
                    rates.setdefault((system, batch), []).append(rate)
            except PeerFailed as error:
                print(f"{system.name} is out: {error}", flush=True)
                del sessions[system]
    return rates


def speed(model: str, system: System, batch: int, count: int, rates: Sequence[Rates]) -> Speed:
    """What all rounds say of one configuration."""
    return Speed(
        model,
        system.name,
        system.weights,
        system.file,
        isinstance(system, OurEngine),
        batch,
        count,
        touched=rates[0].touched,
        **figures(rates),
    )


def bench(
    name: str, folder: Path, systems: Sequence[System], batches: Sequence[int], counts: Sequence[int], rounds: Rounds
) -> list[Speed]:
    """Measure all batches and counts of one checkpoint."""
    speeds = []
    for count in counts:
        with ExitStack() as stack:
            rates = repeated(opened(systems, folder, count, stack), batches, rounds)
        gc.collect()
        new = [speed(name, system, batch, count, runs) for (system, batch), runs in rates.items()]
        for row in new:
            show(row)
        speeds += new
    return speeds


def show(speed: Speed) -> None:
    """Print one line per configuration, so that a long run can be watched."""
    print(
        f"{speed.model:20} {speed.system:16} batch {speed.batch:3}  K {speed.num_experts:2}  "
        f"prefill {speed.prefill:8.0f}  decode {speed.decode:8.1f} tok/s",
        flush=True,
    )


def ceilings(folder: Path, speeds: Sequence[Speed], read: float) -> str:
    """The speed that memory bandwidth allows at batch 1, and the share of it that each system reaches."""
    config, _ = read_config(folder)
    rows = []
    single = [row for row in speeds if row.batch == 1]
    ours = [row for row in single if row.ours]
    for one in single:
        count = one.num_experts
        touched = next((row.touched for row in ours if row.num_experts == count), None)
        gigabytes = step_bytes(config, one.weights, touched, count, own=one.ours and not one.file) / 1e9
        ceiling = read / gigabytes
        figures = (f"{gigabytes:.3f}", f"{ceiling:,.0f}", f"{one.decode / ceiling:.0%}")
        rows.append([one.system, str(count), *figures])
    return grid(["batch 1", "K", "GB a token", "ceiling, tok/s", "reached"], rows)


def report(name: str, folder: Path, speeds: Sequence[Speed], read: float) -> None:
    """The tables of one checkpoint."""
    rows = [asdict(row) for row in speeds]
    print(f"\n{model_tables(name, rows)}")
    if any(row.batch == 1 for row in speeds):
        print(f"\n{ceilings(folder, speeds, read)}\n", flush=True)


def chosen(peers: str, quantize: str, files: str) -> list[System]:
    """Ours in bf16, ours quantised, both on the same files, then the peers asked for; each once."""
    quantised = [OurEngine(kind) for kind in quantize.split(",") if kind]
    systems: list[System] = [OurEngine(), *quantised]
    for kind in files.split(","):
        systems += [OurFile(FILES[kind]), LlamaCpp(FILES[kind])] if kind else []
    for name in peers.split(","):
        systems += PEERS[name] if name else []
    first: dict[str, System] = {}
    for system in systems:
        first.setdefault(system.name, system)
    return list(first.values())


def main(
    model: Annotated[
        list[str] | None, typer.Option(help="bundled, random or a folder; default: all of the former")
    ] = None,
    batch: Annotated[list[int], typer.Option()] = [1, 4, 16, 32],  # noqa: B006
    count: Annotated[list[int], typer.Option(help="expert counts")] = [1, 2, 4, 8],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="rounds of each model and count, with all systems in turn")] = 3,
    minutes: Annotated[float, typer.Option(help="of a model and count, after which no further round begins")] = 600,
    threads: int = 0,
    peers: Annotated[str, typer.Option(help=f"of {', '.join(PEERS)}; those not installed are skipped")] = DEFAULT,
    quantize: Annotated[str, typer.Option(help="ours quantised, too: experts only, or all:")] = "int8,all:int8",
    files: Annotated[str, typer.Option(help=f"llama.cpp's files, by both: of {', '.join(FILES)}")] = "",
    keep: Annotated[Path | None, typer.Option(help="a folder for random models and their files, used again")] = None,
    out: Out = None,
) -> None:
    """Print tables for people and one JSON line for machines; the file has each model as soon as it is measured."""
    use_threads(threads)
    keep_freed_memory()  # for both systems in this process alike
    systems, values, speeds = chosen(peers, quantize, files), facts(), []
    introduce(values)
    for name, folder in checkpoints(model or [*compared_models(), *CHECKPOINTS], scratch(keep)):
        print(f"\n{name}", flush=True)
        new = bench(name, folder, able(systems, folder), batch, count, Rounds(repeats, minutes))
        report(name, folder, new, values["memory_gb_s"])
        speeds += new
        result = values | {"versions": versions(systems, speeds), "rows": [asdict(row) for row in speeds]}
        write(result, out)
    print(*(f"{name}: {version}" for name, version in result["versions"].items()), sep="\n")
    finish(result, out)


def versions(systems: Sequence[System], speeds: Sequence[Speed]) -> dict[str, str]:
    """The versions of the systems that ran."""
    ran = {row.system for row in speeds}
    return {system.name: system.version() for system in systems if system.name in ran}


if __name__ == "__main__":
    typer.run(main)
