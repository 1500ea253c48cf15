"""Calibration of the cost model at start: runs a few synthetic plans on the real runner and fits the constants.

The KV cache is still empty: the plans write to blocks that are not allocated, and no sequence will find the contents.
The work of a plan is what the runner reports.
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

from engine.cost import ExpertPool, StepCost, padded_tokens
from engine.plan import Chunk, Plan, Runner
from engine.sequence import Sequence
from engine.types import EngineInfo, Request, Sampling
from model.budget import ExpertBudget
from model.expert_range import ExpertRange

log = logging.getLogger(__name__)

SHAPES = ((1, 1), (4, 1), (16, 1), (1, 64), (1, 256))  # sequences, and how many tokens of each
MAX_ROWS = max(rows for rows, _ in SHAPES)
ROUNDS = 3
MAX_SECONDS = 1.0  # seconds

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measurement:
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
    token_buckets: tuple[int, ...] = (),
) -> StepCost:
    """The cost model of this runner, measured in warm-up steps and at most about `MAX_SECONDS`.

    `token_buckets`: as of the `StepCost`. Where there are any, a plan's first run may compile and its second may record
    what later runs replay: both are warm-up steps.
    """
    started = clock()
    plans = _plans(info, max_step_tokens)
    samples = _run(runner, plans, [*plans, *plans] if token_buckets else plans[:1], clock)
    cost = fit(samples, pools, token_buckets)
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


def fit(samples: Seq[Measurement], pools: tuple[ExpertPool, ...], token_buckets: tuple[int, ...] = ()) -> StepCost:
    """The non-negative constants with the least squared relative error: short steps count as much as long ones.

    If the samples cannot distinguish two constants, the one per token gets the cost, which makes chunks shorter.
    """
    work = [(padded_tokens(each.tokens, token_buckets), each.pairs, each.distinct, 1) for each in samples]
    work_SW = np.array(work, dtype=np.float64)
    seconds_S = np.array([sample.seconds for sample in samples])
    relative_SW = work_SW / seconds_S[:, None]
    per_token, per_pair, per_expert, fixed = non_negative(relative_SW, np.ones(len(samples))).tolist()
    return StepCost(fixed, per_token, per_pair, per_expert, pools, token_buckets)


def non_negative(a_SW: Floats, b_S: Floats) -> Floats:
    """The x >= 0 with the least |a·x - b|; of equal solutions, the one with the fewest and then the first entries.

    The solution is the plain least-squares solution over its non-zero entries (Lawson & Hanson 1974, ch. 23). With four
    unknowns there are fifteen sets of non-zero entries: all are tried.
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


def _run(runner: Runner, plans: Seq[Plan], warm_ups: Seq[Plan], clock: Callable[[], float]) -> list[Measurement]:
    """The median run of each plan, after warm-ups: the first step of a process is slower than any other. A run is
    skipped if, at the last run's pace per token, it would end too late."""
    for plan in warm_ups:
        runner.run(plan)
    deadline, pace = clock() + MAX_SECONDS, 0.0
    runs: list[list[Measurement]] = [[] for _ in plans]
    for plan, done in list(zip(plans, runs, strict=True)) * ROUNDS:
        tokens, started = sum(chunk.length for chunk in plan), clock()
        if started + pace * tokens > deadline:
            continue  # a smaller one may still do
        work = runner.run(plan).work
        done.append(Measurement(tokens, work.routed_pairs, work.distinct_experts, clock() - started))
        pace = done[-1].seconds / tokens
    return [_median(done) for done in runs if done]


def _median(runs: list[Measurement]) -> Measurement:
    by_time = sorted(runs, key=lambda run: run.seconds)
    return by_time[(len(by_time) - 1) // 2]


def _plans(info: EngineInfo, max_step_tokens: int) -> list[Plan]:
    """Plans of growing size that fit the engine, each with the fewest experts and with the trained count."""
    plans: list[Plan] = []
    for rows, length in SHAPES:
        blocks = rows * -(-length // info.block_size)
        if rows * length <= max_step_tokens and length <= info.max_model_len and blocks <= info.kv_blocks:
            plans += [_plan(rows, length, budget, info) for budget in _budgets(info.experts)]
    return plans


def _budgets(experts: ExpertRange) -> list[ExpertBudget]:
    most = experts.trained if experts.trained > experts.minimum else experts.maximum
    return [ExpertBudget((count,) * experts.layers) for count in sorted({experts.minimum, most})]


def _plan(rows: int, length: int, budget: ExpertBudget, info: EngineInfo) -> Plan:
    """A plan of random tokens, so that routing is spread over the experts; each sequence has blocks of its own."""
    rng, blocks = random.Random(0), -(-length // info.block_size)
    chunks = []
    for row in range(rows):
        prompt = tuple(rng.randrange(info.vocabulary) for _ in range(length))
        sequence = Sequence(Request(f"calibration-{row}", prompt, budget, Sampling(max_tokens=1, seed=row)), 0.0)
        sequence.blocks = list(range(row * blocks, (row + 1) * blocks))
        sequence.slot = row
        chunks.append(Chunk(sequence, 0, length))
    return tuple(chunks)
