"""Measures what a step costs before anybody is served: a handful of made-up plans on the real runner, and a fit.

The cache is still empty: the plans write to its blocks without asking, and nobody will ever find what they left there.
What a plan did is what the runner reports; models are not known here.
"""

import logging
import random
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from engine.cost import ExpertPool, StepCost
from engine.plan import Chunk, Plan, Runner
from engine.sequence import Sequence
from engine.types import EngineInfo, Request, Sampling
from model.budget import ExpertBudget, ExpertRange

log = logging.getLogger(__name__)

SHAPES = ((1, 1), (4, 1), (16, 1), (1, 64), (1, 256))  # sequences, and how many tokens of each
MOST_ROWS = max(rows for rows, _ in SHAPES)
ROUNDS = 3
LIMIT = 1.0  # seconds

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """One step's work and its time; `pairs` and `distinct` experts are sums over the MoE layers."""

    tokens: int
    pairs: int
    distinct: int
    seconds: float


def measure(
    runner: Runner,
    info: EngineInfo,
    pools: tuple[ExpertPool, ...],
    max_step_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> StepCost:
    """What a step of this runner costs, found within a first step and `LIMIT` seconds."""
    started = clock()
    samples = _run(runner, _plans(info, max_step_tokens), clock)
    cost = fit(samples, pools)
    log.info(
        "a step costs %.3g ms, %.3g µs per token, %.3g µs per routed pair and %.3g µs per distinct expert "
        "(%d plans measured in %.2f s)",
        cost.fixed * 1e3,
        cost.per_token * 1e6,
        cost.per_pair * 1e6,
        cost.per_expert * 1e6,
        len(samples),
        clock() - started,
    )
    return cost


def fit(samples: Seq[Sample], pools: tuple[ExpertPool, ...]) -> StepCost:
    """The constants, none negative, with the least squared relative error: a short step matters as much as a long one.

    What the samples cannot tell apart is put down to the tokens, so that doubt makes chunks shorter.
    """
    work_SW = np.array([(each.tokens, each.pairs, each.distinct, 1) for each in samples], dtype=np.float64)
    relative_SW = work_SW / np.array([[each.seconds] for each in samples])
    per_token, per_pair, per_expert, fixed = non_negative(relative_SW, np.ones(len(samples))).tolist()
    return StepCost(fixed, per_token, per_pair, per_expert, pools)


def non_negative(a_SW: Floats, b_S: Floats) -> Floats:
    """The x >= 0 with the least |a·x - b|; among equals, the one with the fewest and then the first entries.

    The best x is the plain least-squares solution over the entries where it is not zero (Lawson & Hanson 1974, ch. 23).
    With four unknowns there are fifteen choices of these: all are tried.
    """
    width = a_SW.shape[1]
    best_W, least = np.zeros(width), float(b_S @ b_S)
    for size in range(1, width + 1):
        for chosen in map(list, combinations(range(width), size)):
            x_W = np.zeros(width)
            x_W[chosen] = np.linalg.lstsq(a_SW[:, chosen], b_S, rcond=None)[0]
            error = float(np.sum((a_SW @ x_W - b_S) ** 2))
            if x_W.min() >= 0 and error < least - 1e-12:
                best_W, least = x_W, error
    return best_W


def _run(runner: Runner, plans: Seq[Plan], clock: Callable[[], float]) -> list[Sample]:
    """The median run of each plan. None is begun that would, at the last one's pace per token, end after the limit."""
    runner.run(plans[0])  # the first step of a process is like no other
    deadline, pace = clock() + LIMIT, 0.0
    runs: list[list[Sample]] = [[] for _ in plans]
    for plan, done in list(zip(plans, runs, strict=True)) * ROUNDS:
        tokens, started = sum(chunk.length for chunk in plan), clock()
        if started + pace * tokens > deadline:
            continue  # a smaller one may still do
        work = runner.run(plan).work
        done.append(Sample(tokens, work.routed_pairs, work.distinct_experts, clock() - started))
        pace = done[-1].seconds / tokens
    return [sorted(done, key=lambda sample: sample.seconds)[(len(done) - 1) // 2] for done in runs if done]


def _plans(info: EngineInfo, max_step_tokens: int) -> list[Plan]:
    """Plans of rising size that fit the engine, each with few experts and with as many as usual."""
    return [
        _plan(rows, length, budget, info)
        for rows, length in SHAPES
        if rows * length <= max_step_tokens and length <= info.max_model_len
        if rows * -(-length // info.block_size) <= info.kv_blocks
        for budget in _budgets(info.experts)
    ]


def _budgets(experts: ExpertRange) -> list[ExpertBudget]:
    most = experts.trained if experts.trained > experts.minimum else experts.maximum
    return [ExpertBudget((count,) * experts.layers) for count in sorted({experts.minimum, most})]


def _plan(rows: int, length: int, budget: ExpertBudget, info: EngineInfo) -> Plan:
    """Random tokens, so that routers spread them as they would; each sequence has blocks of its own."""
    rng, blocks = random.Random(0), -(-length // info.block_size)
    chunks = []
    for row in range(rows):
        prompt = tuple(rng.randrange(info.vocabulary) for _ in range(length))
        sequence = Sequence(Request(f"calibration-{row}", prompt, budget, Sampling(max_tokens=1, seed=row)), 0.0)
        sequence.blocks, sequence.slot = list(range(row * blocks, (row + 1) * blocks)), row
        chunks.append(Chunk(sequence, 0, length))
    return tuple(chunks)
