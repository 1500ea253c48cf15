"""Routing rules inside the engine: refused by name, counted as they ran, and part of the key of every block."""

from dataclasses import replace

import pytest

from engine.engine import Engine
from engine.plan import Plan, StepResult
from engine.types import Request, RequestStats, Sampling
from model.backends.cpu.kernels.library import load
from model.backends.torch.backend import TorchRunnable
from model.budget import FAMILY_RULE, ExpertBudget, RoutingRule
from model.errors import InvalidRequest
from tests.engine.random_workload import Bench, Served, bench
from tests.model.tiny import decoder, infinity, llama_like, topk

SERVED = Served(llama_like(topk(normalise=True), topk(), qk_norm="full"), block=4, few=10, requests=1)
WIDE = llama_like(topk(normalise=True), topk(), qk_norm="full", context=80, head_width=16)
NATIVE = Served(WIDE, block=16, few=5, requests=1, native=True)
each_backend = pytest.mark.parametrize(
    "served",
    [SERVED, pytest.param(NATIVE, marks=pytest.mark.skipif(not load().native, reason=load().reason))],
    ids=["torch", "native"],
)
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)
ADAPTIVE = [RoutingRule(threshold=0.6), RoutingRule("raw", top_p=0.4), RoutingRule(reuse=2)]


def asked(id: str, rule: RoutingRule = FAMILY_RULE, count: int = 3, **changes: object) -> Request:
    sampling = Sampling(max_tokens=8, seed=1, temperature=0.0)
    return replace(Request(id, PROMPT, ExpertBudget((count, count), rule=rule), sampling), **changes)  # type: ignore[arg-type]


def ran(engine: Engine, *requests: Request) -> tuple[dict[str, RequestStats], int]:
    """The statistics of requests that run together, and the pairs of all steps."""
    for each in requests:
        engine.add(each)
    stats, pairs = {}, 0
    while engine.has_work:
        report = engine.step()
        pairs += report.stats.routed_pairs
        for event in report.events:
            assert event.error is None
            if event.finish is not None and event.stats is not None:
                stats[event.request_id] = event.stats
    return stats, pairs


@pytest.mark.parametrize("speculate", ["off", "ngram", "experts=1"])
@pytest.mark.parametrize("rule", ADAPTIVE)
@each_backend
def test_pairs_are_counted_as_they_ran(served: Served, rule: RoutingRule, speculate: str) -> None:
    crowd = bench(replace(served, speculate=speculate), step_tokens=9)
    stats, pairs = ran(crowd.engine, asked("plain"), asked("a", rule), asked("b", rule, count=5, salt="b"))
    assert sum(each.routed_pairs for each in stats.values()) == pairs
    for id, count in (("plain", 3), ("a", 3), ("b", 5)):
        allowed = stats[id].computed_tokens * count * 2
        mean = stats[id].mean_count(layers=2)
        assert stats[id].trained_pairs == stats[id].computed_tokens * 2 * 2
        assert mean == stats[id].routed_pairs / stats[id].computed_tokens / 2
        if id != "plain":
            assert stats[id].routed_pairs != allowed
        elif speculate != "experts=1":
            assert mean == 3.0


def test_a_preempted_request_counts_what_it_computed_again() -> None:
    crowd = bench(SERVED, blocks=16, step_tokens=9, cache=False)
    rule = ADAPTIVE[0]
    long = Sampling(max_tokens=40, seed=1, temperature=0.0)
    stats, pairs = ran(crowd.engine, *(asked(str(id), rule, salt=str(id), sampling=long) for id in range(5)))
    assert sum(each.preemptions for each in stats.values()) > 0
    assert sum(each.routed_pairs for each in stats.values()) == pairs


def test_what_is_run_again_in_parts_is_counted_for_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails as a whole: what its parts ran is each request's own."""
    requests = [asked("a", ADAPTIVE[0]), asked("plain"), asked("b", ADAPTIVE[1], count=5)]
    expected = [ran(bench(SERVED, cache=False).engine, each)[0][each.id].routed_pairs for each in requests]
    engine = bench(SERVED, cache=False).engine
    runner = engine.runner
    run = runner.run

    def failing(plan: Plan) -> StepResult:
        if len(plan) == 3:
            raise ArithmeticError("three are too many")
        return run(plan)

    monkeypatch.setattr(runner, "run", failing)
    stats, _ = ran(engine, *requests)
    assert [stats[each.id].routed_pairs for each in requests] == expected


OTHER_EXPERTS = [RoutingRule(skip=1), RoutingRule(kept=("110111", "111111"))]
RULES = [
    FAMILY_RULE,
    RoutingRule("raw"),
    RoutingRule("kept"),
    RoutingRule(5),
    RoutingRule(repair=True),
    *OTHER_EXPERTS,
    *ADAPTIVE,
]


@pytest.mark.parametrize("first", RULES)
def test_blocks_are_shared_only_by_requests_with_one_rule(first: RoutingRule) -> None:
    crowd = bench(SERVED)
    ran(crowd.engine, asked("first", first))
    cached = {rule: ran(crowd.engine, asked("again", rule))[0]["again"].cached_tokens for rule in RULES}
    assert cached == {rule: 8 if rule == first else 0 for rule in RULES}


def refused(crowd: Bench, rule: RoutingRule) -> str | None:
    with pytest.raises(InvalidRequest) as error:
        crowd.engine.add(asked("a", rule))
    assert not crowd.engine.has_work
    return error.value.param


def test_what_the_model_cannot_do_is_refused_by_name() -> None:
    draws = bench(replace(SERVED, config=llama_like(infinity(), infinity())))
    for rule, field in zip(
        [RoutingRule("raw"), *ADAPTIVE, RoutingRule(skip=1)],
        ["normaliser", "threshold", "normaliser", "reuse", "skip"],
        strict=True,
    ):
        assert refused(draws, rule) == f"experts.{field}"
    plain = bench(SERVED, model=TorchRunnable(decoder(SERVED.config)))
    assert refused(plain, RoutingRule(repair=True)) == "experts.repair"


class Ruleless(TorchRunnable):
    """A backend that runs no rules."""

    rules = False
    kernels = "portable"


class Setless(TorchRunnable):
    """A backend that keeps no set of experts, as the one for GPUs."""

    sets = False
    kernels = "other"


def test_a_backend_that_keeps_no_sets_refuses_them_by_name() -> None:
    crowd = bench(SERVED, model=Setless(decoder(SERVED.config)))
    with pytest.raises(InvalidRequest, match=r"experts\.set is refused: other keeps no set of experts"):
        crowd.engine.add(asked("a", OTHER_EXPERTS[1]))
    ran(crowd.engine, asked("b", OTHER_EXPERTS[0]))


def test_a_backend_that_runs_no_rules_refuses_them() -> None:
    crowd = bench(SERVED, model=Ruleless(decoder(SERVED.config)))
    assert [refused(crowd, rule) for rule in (RoutingRule("raw"), RoutingRule(repair=True))] == [
        "experts.normaliser",
        "experts.repair",
    ]
