"""The rows of the study: the sets that `docs/training.md` reports, and rows that are prepared and have not been run.

Every row is one small network and its plan; what a row does not name is as in `SMALL` and `Plan`.
"""

from dataclasses import dataclass, replace
from typing import Any

from training.gpu.network import Shape
from training.gpu.plan import Plan

SMALL = Shape(width=256, layers=4, heads=4, kv_heads=2, blocks=96, block=32, kept=3)
TOPK: dict[str, Any] = {"kind": "topk", "blocks": 32, "block": 64}
WHOLE: dict[str, Any] = {"by_block": False}


@dataclass(frozen=True, slots=True)
class Run:
    """One row of the table."""

    name: str
    shape: Shape
    plan: Plan


def run(name: str, plan: dict[str, Any] | None = None, **shape: Any) -> Run:
    """A row of a name, with what differs from the usual plan and shape."""
    return Run(name, replace(SMALL, **shape), replace(Plan(), **(plan or {})))


def norm(name: str, plan: dict[str, Any], **shape: Any) -> Run:
    """A row with the norm restored and Muon on whole matrices, as in most of the second set."""
    return run(name, WHOLE | plan, **{"aggregate": "norm"} | shape)


FIRST = (
    run("points, no replacement, sum"),
    run("points, no replacement, sum, Muon on whole matrices", WHOLE),
    run("points, no replacement, sum, sandwich", {"counts": "sandwich"}),
    run("no spread (the mean every time), no replacement, sum", draws="mean"),
    run("points, no replacement, norm", aggregate="norm"),
    run("points, replacement, norm", replacement=True, aggregate="norm"),
    run("top-k, weights over all experts", **TOPK),
    run("one draw of 3 groups", {"counts": "1"}, kept=3, largest=1),
    run("one draw of 12 groups", {"counts": "1"}, kept=12, largest=1),
    run("one draw of 24 groups", {"counts": "1"}, kept=24, largest=1),
    run("dense, 3 % of the units", kind="dense", blocks=3, largest=1),
    run("dense, 12.5 % of the units", kind="dense", blocks=12, largest=1),
    run("dense, 25 % of the units", kind="dense", blocks=24, largest=1),
)

SECOND = (
    norm("Muon 0.01", {"muon_lr": 0.01}),
    norm("Muon 0.02", {}),
    norm("Muon 0.04", {"muon_lr": 0.04}),
    norm("router and scores at 1e-3", {"route_lr": 1e-3}),
    norm("gate width 96", {}, space=96),
    norm("negative scores cut off", {}, values="relu"),
    norm("mask of norm 1", {}, aggregate="unit"),
    norm("no spread", {}, draws="mean"),
    run("no spread, softmax weights", WHOLE, values="softmax", draws="mean"),
    run("no spread, softmax weights, Muon by block", values="softmax", draws="mean"),
    run("top-k, Muon by expert", **TOPK),
    run("top-k, Muon on whole matrices", WHOLE, **TOPK),
)

OPEN = (
    run("points, no replacement, sum, seed 2", {"seed": 2}),
    run("top-k, seed 2", {"seed": 2}, **TOPK),
    norm("distillation", {"distil": 0.5}),
    norm("sandwich", {"counts": "sandwich"}),
    norm("uniform K", {"counts": "uniform"}),
    norm("learned points", {}, draws="learned"),
    norm("random draws", {}, draws="random"),
    norm("1 group a draw", {}, kept=1),
    norm("6 groups a draw", {}, kept=6),
    norm("groups of 16", {}, blocks=192, block=16, kept=6),
    norm("groups of 64", {}, blocks=48, block=64, kept=2),
    run("one draw of 12 groups, Muon on whole matrices", WHOLE | {"counts": "1"}, kept=12, largest=1),
    run("dense, 12.5 % of the units, Muon on whole matrices", WHOLE, kind="dense", blocks=12, largest=1),
    run("random draws, replacement, mean", WHOLE, replacement=True, draws="random", aggregate="mean", kept=24),
    run("top-k, K = 8 in training", {"counts": "8"}, **TOPK),
    run("top-k, sandwich", {"counts": "sandwich"}, **TOPK),
    run("top-k, normalised", normalise=True, **TOPK),
)

SETS = {"first": FIRST, "second": SECOND, "open": OPEN}
