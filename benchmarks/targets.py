"""Results as markdown for the docs: `python -m benchmarks.targets FILE...`, the JSON lines of `benchmarks.offline`,
`long_context` and `packed`: their tables, and for the first which targets are met. It measures nothing."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import long_context, packed
from benchmarks.checkpoints import CHECKPOINTS
from benchmarks.tables import grid, page

Row = Mapping[str, Any]
BATCHES = (1, 4, 16, 32)


@dataclass(frozen=True, slots=True)
class Target:
    """What one of our systems should be, over the best of some peers, by batch."""

    says: str
    figure: str
    ours: str
    theirs: tuple[str, ...]
    wanted: tuple[float, ...]


IK = tuple(f"ik_llama.cpp {kind}" for kind in ("q4_0", "q4_k_m", "iq4_ks"))
FILES = tuple(
    Target(f"{kind.upper()} file, {figure}", figure, f"moedial {kind} file", (f"llama.cpp {kind}",), wanted)
    for kind in ("q4_0", "q4_k_m")
    for figure, wanted in (("decode", (1.3, 1.6, 1.8, 2.4)), ("prefill", (2.5, 2.5, 2.5, 2.5)))
)
SHAPES = (
    *FILES,
    Target("bf16, prefill, against llama.cpp", "prefill", "moedial", ("llama.cpp bf16",), (3.3,) * 4),
    Target(
        "int4, decode, against ik_llama.cpp's best of 4 bits", "decode", "moedial all:int4", IK, (1.3, 1.3, 1.5, 2.5)
    ),
    Target("int4, prefill, against ik_llama.cpp's best of 4 bits", "prefill", "moedial all:int4", IK, (1.0,) * 4),
)
FAMILIES = (
    Target("bf16, decode, against llama.cpp", "decode", "moedial", ("llama.cpp bf16",), (1.2, 1.5, 1.8, 2.0)),
    Target("bf16, prefill, against llama.cpp", "prefill", "moedial", ("llama.cpp bf16",), (2.0,) * 4),
    *FILES[:2],
)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over a peer's: of the medians, and in each round, in which both took their turn."""

    medians: float
    rounds: tuple[float, ...]

    @property
    def spread(self) -> str:
        """The lowest and the highest round; a dash where there was one."""
        return f"{min(self.rounds):.2f}–{max(self.rounds):.2f}" if len(self.rounds) > 1 else "–"


def ratio(ours: Row, theirs: Row, figure: str) -> Ratio:
    """Of one figure; a system that failed has fewer rounds, and they are the first."""
    rounds = zip(ours["runs"], theirs["runs"], strict=False)
    return Ratio(ours[figure] / theirs[figure], tuple(mine[figure] / other[figure] for mine, other in rounds))


def ratios(rows: Sequence[Row], target: Target) -> dict[int, Ratio]:
    """Ours over the best of the peers at the largest count, by batch, where both were measured."""
    found = {}
    most = max(row["num_experts"] for row in rows)
    for batch in BATCHES:
        at = {row["system"]: row for row in rows if (row["batch"], row["num_experts"]) == (batch, most)}
        peers = [at[name] for name in target.theirs if name in at]
        if peers and target.ours in at:
            best = max(peers, key=lambda row: row[target.figure])
            found[batch] = ratio(at[target.ours], best, target.figure)
    return found


def line(rows: Sequence[Row], target: Target) -> list[str]:
    """What it says, and at each batch what is wanted, what was measured, its spread and whether it is met."""
    found = ratios(rows, target)
    wanted = dict(zip(BATCHES, target.wanted, strict=True))
    missed = [str(batch) for batch, ratio in found.items() if round(ratio.medians, 2) < wanted[batch]]
    met = "met"
    if missed:
        met = "not met" if len(missed) == len(found) else f"not met at {', '.join(missed)}"
    batches = " / ".join(map(str, found))
    goals = " / ".join(f"{wanted[batch]:g}" for batch in found)
    measured = " / ".join(f"{ratio.medians:.2f}" for ratio in found.values())
    spread = " / ".join(ratio.spread for ratio in found.values())
    return [target.says, batches, goals, measured, spread, met]


def met(rows: Sequence[Row]) -> str:
    """The table of targets of every model, as far as they were measured; "" where none was."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        for target in SHAPES if model in CHECKPOINTS else FAMILIES:
            if ratios(own, target):
                lines.append([model.removesuffix("-random"), *line(own, target)])
    return grid(["model", "ratio", "batch", "target", "measured", "rounds", ""], lines) if lines else ""


def shown(result: Mapping[str, Any]) -> str:
    """The tables of one result."""
    rows = result["rows"]
    if "context" in rows[0]:
        return long_context.report(rows)
    if "counts" in rows[0]:
        return packed.report(rows)
    return f"{page(result)}\n{met(rows)}"


if __name__ == "__main__":
    for path in sys.argv[1:]:
        result = json.loads(Path(path).read_text().splitlines()[-1])
        about = f"{result['date'][:10]}, {result['machine']}, {result['threads']} threads"
        print(f"{about}, memory read at {result['memory_gb_s']} GB/s\n\n{shown(result)}\n")
