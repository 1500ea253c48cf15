"""The constants that a fit finds, and how measuring keeps to its time and leaves nothing behind."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.assembly import assemble, pools
from engine.build import build_engine
from engine.calibrate import MAX_SECONDS, ROUNDS, SHAPES, Measurement, fit, measure, non_negative
from engine.cost import ExpertPool, StepCost
from engine.description import describe
from engine.plan import MoEWork, Plan, Sampled, StepResult
from engine.types import EngineInfo, EngineSettings
from model.backends.torch.backend import TorchRunnable
from model.expert_range import ExpertRange
from tests.engine.costs import COST, LAYERS, work_of
from tests.engine.fake import build_fake, request
from tests.model.tiny import decoder, infinity, llama_like, topk
from tests.weights.checkpoints import OLMOE, write

INFO = replace(build_fake(EngineSettings("fake"))[1], experts=ExpertRange(LAYERS, trained=4, minimum=1, maximum=8))


class Bench:
    """A runner whose steps take just what `cost` says, on a clock of their own. `noise` is relative."""

    def __init__(self, cost: StepCost, noise: float = 0.0) -> None:
        self.cost, self.now, self.noise = cost, 0.0, noise
        self.stalls: dict[int, float] = {}  # seconds that the step of this number takes longer
        self.plans: list[Plan] = []
        self._rng = np.random.default_rng(0)

    def clock(self) -> float:
        return self.now

    def run(self, plan: Plan) -> StepResult:
        self.plans.append(plan)
        tokens, pairs, expected = work_of(self.cost.pools, plan)
        distinct = round(expected)
        self.now += self.cost.seconds(tokens, pairs, distinct) * (1 + self.noise * self._rng.standard_normal())
        self.now += self.stalls.get(len(self.plans), 0.0)
        return StepResult(tuple(Sampled(0) for chunk in plan if chunk.samples), MoEWork(pairs, pairs, distinct, 1.0))

    def measure(self, info: EngineInfo = INFO, max_step_tokens: int = 512) -> StepCost:
        return measure(self, info, self.cost.pools, max_step_tokens, self.clock, self.cost.token_buckets)

    def shapes(self) -> list[tuple[int, int]]:
        """Sequences and tokens of each plan, in the order in which they first ran."""
        return list(dict.fromkeys((len(plan), plan[0].length) for plan in self.plans))


def samples(cost: StepCost, noise: float) -> list[Measurement]:
    rng = np.random.default_rng(3)
    work = [(t, t * k * 2, round(32 * (1 - (1 - k / 16) ** t))) for t in (1, 4, 16, 64, 256) for k in (1, 4)]
    return [Measurement(*each, cost.seconds(*each) * (1 + noise * rng.standard_normal())) for each in work]


def values(cost: StepCost) -> list[float]:
    return [cost.fixed, cost.per_token, cost.per_pair, cost.per_expert]


def test_fit_finds_the_constants() -> None:
    assert values(fit(samples(COST, noise=0.0), COST.pools)) == pytest.approx(values(COST), rel=1e-6)
    assert values(fit(samples(COST, noise=0.01), COST.pools)) == pytest.approx(values(COST), rel=0.2)


@pytest.mark.parametrize("missing", ["fixed", "per_token", "per_pair", "per_expert"])
def test_fit_of_noisy_samples_is_never_negative(missing: str) -> None:
    cost = replace(COST, **{missing: 0.0})
    fitted = fit(samples(cost, noise=0.05), cost.pools)
    assert min(values(fitted)) >= 0
    for sample in samples(cost, noise=0.0):
        estimate = fitted.seconds(sample.tokens, sample.pairs, sample.distinct)
        assert estimate == pytest.approx(sample.seconds, rel=0.25)


def test_what_cannot_be_told_apart_is_the_tokens() -> None:
    assert values(fit([Measurement(1, 2, 2, 0.5)], ())) == pytest.approx([0, 0.5, 0, 0])


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_non_negative_least_squares_is_optimal(seed: int, rows: int) -> None:
    """Against the conditions of Karush, Kuhn and Tucker: no entry is negative, and no change of any would help."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rows, 4)), rng.standard_normal(rows)
    x = non_negative(a, b)
    slope = a.T @ (a @ x - b)
    assert x.min() >= 0
    assert slope.min() > -1e-5
    assert np.abs(slope[x > 0]).max(initial=0.0) < 1e-5


def test_measuring_finds_the_constants_of_the_runner() -> None:
    assert values(Bench(COST).measure()) == pytest.approx(values(COST), rel=1e-6)
    assert values(Bench(COST, noise=0.01).measure()) == pytest.approx(values(COST), rel=0.3)


def test_a_slow_first_step_and_a_stall_in_any_round_do_not_count() -> None:
    bench = Bench(COST)
    bench.stalls = {1: 5.0, 4: 0.1, 20: 0.1, 28: 0.1}
    assert values(bench.measure()) == pytest.approx(values(COST), rel=1e-6)
    assert bench.shapes() == list(SHAPES)


def test_where_steps_are_padded_two_runs_of_each_plan_do_not_count() -> None:
    """One may compile what it runs, and one may record it."""
    bench = Bench(replace(COST, token_buckets=(1, 2, 8, 16)))
    plans = 2 * len(SHAPES)
    bench.stalls = {number: 3.0 for number in range(1, 2 * plans + 1)}
    measured = bench.measure()
    assert values(measured) == pytest.approx(values(COST), rel=1e-6)
    assert measured.token_buckets == (1, 2, 8, 16)
    assert len(bench.plans) == (2 + ROUNDS) * plans


def test_plans_are_whole_sequences_on_blocks_of_their_own() -> None:
    bench = Bench(COST)
    bench.measure()
    assert bench.shapes() == list(SHAPES)
    for plan in bench.plans:
        blocks = [block for chunk in plan for block in chunk.sequence.blocks]
        assert len(set(blocks)) == len(blocks) and set(blocks) <= set(range(INFO.kv_blocks))
        assert all(len(chunk.sequence.blocks) * INFO.block_size >= chunk.length for chunk in plan)
        assert all(chunk.samples and max(chunk.sequence.tokens) < INFO.vocabulary for chunk in plan)
    assert {plan[0].sequence.request.budget.per_layer for plan in bench.plans} == {(1, 1), (4, 4)}


@pytest.mark.parametrize(
    ("changes", "tokens", "expected"),
    [
        ({}, 100, SHAPES[:4]),
        ({"max_model_len": 10}, 512, SHAPES[:3]),
        ({"kv_blocks": 4}, 512, ((1, 1), (4, 1), (1, 64))),
        ({"experts": ExpertRange(0, 0, 0, 0)}, 512, SHAPES),
        ({"experts": ExpertRange(LAYERS, 1, 1, 1)}, 512, SHAPES),
    ],
)
def test_plans_fit_the_engine(changes: dict[str, object], tokens: int, expected: tuple[tuple[int, int], ...]) -> None:
    bench = Bench(replace(COST, pools=()))
    bench.measure(replace(INFO, **changes), tokens)  # type: ignore[arg-type]
    assert bench.shapes() == list(expected)


@pytest.mark.parametrize("slower", [1, 5, 30, 1000])
def test_measuring_keeps_to_its_time(slower: int) -> None:
    """Beyond the limit there are at most the very first step and the first that counts."""
    bench = Bench(StepCost(*(slower * value for value in values(COST)), COST.pools))
    first = bench.cost.seconds(1, 2, 2)
    cost = bench.measure()
    assert bench.now <= MAX_SECONDS + 2 * first
    assert cost.seconds(1, 2, 2) == pytest.approx(first, rel=0.5)


def test_the_real_runner_is_measured_and_nothing_is_left_behind() -> None:
    model = TorchRunnable(decoder(llama_like(topk(), infinity(), context=64)))
    settings = EngineSettings("", block_size=4, kv_cache_bytes=1 << 20)
    engine, blocks = assemble(model, settings)
    info = replace(INFO, kv_blocks=blocks, **describe(model, settings))
    cost = measure(engine.runner, info, pools(model.config), 512)
    assert min(values(cost)) >= 0 and cost.seconds(1, 2, 2) > 0
    assert cost.pools == (ExpertPool(6), ExpertPool(12, kept=3))
    manager = engine.scheduler.blocks
    manager.check()
    assert (manager.used, engine.scheduler.has_work) == (0, False)
    engine.add(request("a", tuple(range(40)), max_tokens=1))
    assert engine.step().stats.prefix_hits == 0


def test_an_assembled_engine_plans_by_the_cost_that_it_is_given() -> None:
    model = TorchRunnable(decoder(llama_like(topk(), topk(), context=64)))
    settings = EngineSettings("", block_size=4, kv_cache_bytes=1 << 20, step_ms=20)
    lengths = []
    for cost in (None, StepCost(0.0, 1e-3, 0.0, 0.0, (ExpertPool(6), ExpertPool(6)))):
        engine, _ = assemble(model, settings, cost)
        engine.add(request("a"))
        engine.step()
        engine.add(request("b", tuple(range(5, 55))))
        lengths.append(engine.step().stats.prompt_tokens)
    assert lengths == [50, 19]


def test_a_real_server_measures_and_a_limit_of_zero_does_not(tmp_path: Path) -> None:
    write(tmp_path, OLMOE)
    settings = EngineSettings(str(tmp_path), kv_cache_bytes=1 << 20)
    engine, info = build_engine(settings)
    assert info.step_cost is not None
    assert engine.scheduler.cost == info.step_cost
    assert info.step_cost.pools == (ExpertPool(5), ExpertPool(5))
    engine.add(request("a"))
    assert engine.step().stats.estimated_s > 0
    engine, info = build_engine(replace(settings, step_ms=0))
    assert (engine.scheduler.cost, info.step_cost) == (None, None)
