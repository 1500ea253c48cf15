"""A step that is planned and not committed yet, and the statistics of one that is.

It reads the step's plan, its events and the scheduler's state, and runs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.plan import MoEWork, Plan, PlanStats, rows_of
from engine.scheduler import Scheduler
from engine.types import StepStats, TokenEvent


@dataclass(slots=True)
class OpenStep:
    """A step that is planned and not committed. `launched`: what an overlapping runner calls it."""

    plan: Plan
    stats: PlanStats
    prefilled: int  # prompt tokens
    launched: Any = None
    launched_at: float = 0.0  # 0: never, as all steps of a runner that waits for them
    error: Exception | None = None


def step_stats(
    step: OpenStep,
    scheduler: Scheduler,
    events: Sequence[TokenEvent],
    work: MoEWork,
    *,
    seconds: float,
    retries: int,
    masks_s: float,
) -> StepStats:
    """The statistics of a step that has just been committed."""
    snapshots = scheduler.blocks.snapshots
    rows = rows_of(step.plan)
    count_sets = {counts for chunk in rows for counts, _ in chunk.count_runs}
    contrasted = 0 if rows is step.plan else sum(c.length for c in step.plan if c.sequence.weak is not None)
    return StepStats(
        seconds=seconds,
        estimated_s=step.stats.estimated_s,
        prompt_tokens=step.prefilled,
        generated_tokens=len([event for event in events if event.token is not None]),
        routed_pairs=work.routed_pairs,
        trained_pairs=work.trained_pairs,
        distinct_experts=work.distinct_experts,
        mixed=len(count_sets) > 1,
        load_imbalance=work.load_imbalance,
        preemptions=step.stats.preemptions,
        prefix_queries=step.stats.prefix_queries,
        prefix_hits=step.stats.prefix_hits,
        drafted=step.stats.drafted,
        accepted=step.stats.accepted,
        running=scheduler.running,
        waiting=scheduler.waiting,
        oldest_waiting_s=scheduler.oldest_waiting_s,
        blocks_used=scheduler.blocks.used,
        blocks_total=scheduler.blocks.total,
        retries=retries,
        masks_s=masks_s,
        contrast_tokens=contrasted,
        snapshots=0 if snapshots is None else len(snapshots),
        snapshot_bytes=0 if snapshots is None else snapshots.held_bytes,
        snapshots_displaced=step.stats.snapshots_displaced,
    )
