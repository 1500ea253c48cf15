"""Self-contrast decoding in an engine: two rows of one sequence, alone and beside others, however a step is run.

What it should say is computed apart: by two engines, one of each row, whose logits are contrasted by the formula.
"""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.blocks import BlockManager
from engine.engine import Engine
from engine.plan import Plan, StepResult, rows_of
from engine.sampling.contrast import contrasted
from engine.scheduler import Scheduler
from engine.types import Request, Sampling, TokenEvent
from model.backends.cpu.kernels.library import load
from model.backends.torch.backend import TorchRunnable
from model.budget import ExpertBudget, RoutingRule
from model.contrast import Contrast
from model.errors import InvalidRequest
from model.shapes.attention import Attention, GatedDeltaNet
from model.shapes.rope import Rope
from tests.engine.fake import FakeRunner, request
from tests.engine.random_workload import Served, alone, assert_as_alone, bench, random_request
from tests.engine.test_overlap_model import OnDevice
from tests.model.tiny import infinity, llama_like, topk

TORCH = Served(llama_like(topk(normalise=True), topk(), context=40), block=4, few=10, requests=1)
WIDE = llama_like(topk(normalise=True), topk(), qk_norm="full", context=80, head_width=16)
NATIVE = Served(WIDE, block=16, few=5, requests=1, native=True)
RECURRENT = (
    GatedDeltaNet(key_heads=2, value_heads=4, key_width=4, value_width=4, kernel=3),
    Attention(4, 2, 6, rope=Rope(6)),
)
STATES = replace(TORCH, config=llama_like(topk(), topk(), attention=RECURRENT, context=40))
without = pytest.mark.skipif(not load().native, reason=f"no native kernels: {load().reason}")
each_backend = pytest.mark.parametrize("served", [TORCH, pytest.param(NATIVE, marks=without)], ids=["torch", "native"])
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)
STRONG, RANK = (3, 2), 2
CONTRAST = Contrast(0.7, 0.05, RANK)


def asked(id: str = "a", contrast: Contrast | None = CONTRAST, new: int = 12, **options: Any) -> Request:
    sampling = Sampling(**{"max_tokens": new, "seed": 1, "temperature": 0.0} | options)
    return Request(id, PROMPT, ExpertBudget(STRONG, contrast=contrast), sampling)


def run(engine: Engine, *requests: Request) -> dict[str, list[TokenEvent]]:
    """The events of requests that run together."""
    events: dict[str, list[TokenEvent]] = {each.id: [] for each in requests}
    for each in requests:
        engine.add(each)
    while engine.has_work:
        for event in engine.step().events:
            assert event.error is None
            events[event.request_id].append(event)
    engine.scheduler.check()
    assert engine.scheduler.blocks.used == 0
    return events


def text(events: list[TokenEvent]) -> list[int | None]:
    return [event.token for event in events]


@each_backend
def test_logits_are_those_of_two_engines_contrasted(served: Served) -> None:
    """Each row by itself is a plain request, whose prompt is all tokens so far."""
    found = alone(served, asked(new=6))
    rows = {"strong": ExpertBudget(STRONG), "weak": ExpertBudget((1, 1), rule=RoutingRule(skip=RANK - 1))}
    for position, logits_V in found.logits["a"].items():
        tokens = (*PROMPT, *found.tokens["a"])[:position]
        sampling = Sampling(max_tokens=1, seed=1, temperature=0.0)
        row = {
            name: alone(served, Request(name, tokens, budget, sampling)).logits[name][position]
            for name, budget in rows.items()
        }
        beta, log_alpha = torch.tensor([CONTRAST.beta]), torch.tensor([CONTRAST.alpha]).double().log().float()
        expected_V = contrasted(row["strong"][None].float(), row["weak"][None].float(), beta, log_alpha)[0]
        served.assert_same(logits_V, expected_V)
        assert found.tokens["a"][position - len(PROMPT)] == int(expected_V.argmax())
    plain = alone(served, asked(contrast=None, new=6))
    assert found.tokens["a"] != plain.tokens["a"], "the contrast changes this answer"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_beta_0_is_plain_decoding(temperature: float) -> None:
    plain, none = (
        alone(TORCH, asked(contrast=contrast, temperature=temperature, new=25))
        for contrast in (None, Contrast(0.0, 0.5, 4))
    )
    assert none.tokens == plain.tokens and none.computed == plain.computed


def random_contrasted(rng: random.Random, number: int, served: Served) -> Request:
    made = random_request(rng, number, served)
    if rng.random() < 0.5:
        return made
    contrast = Contrast(rng.choice([0.2, 0.5, 2.0]), rng.choice([0.02, 0.3]), rng.randint(1, 6))
    return replace(made, budget=replace(made.budget, contrast=contrast))


@pytest.mark.parametrize(
    "served",
    [TORCH, pytest.param(NATIVE, marks=without), pytest.param(STATES, marks=pytest.mark.redundant)],
    ids=["torch", "native", "recurrent"],
)
def test_mixed_batches_give_what_each_request_gets_alone(served: Served) -> None:
    """Chunks, preemptions, prefixes found again, aborts: with and without a second row, side by side."""
    rng = random.Random(4)
    todo = [random_contrasted(rng, number, served) for number in range(16 if served.native else 10)]
    crowd = bench(served, blocks=2 * served.few, step_tokens=11, running=6)
    waiting = list(todo)
    while waiting or crowd.engine.has_work:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if waiting:
                crowd.engine.add(waiting.pop())
        if rng.random() < 0.04:
            crowd.engine.abort(str(rng.randrange(len(todo))))
        crowd.step()
    assert crowd.engine.scheduler.blocks.used == 0
    assert sum(step.preemptions for step in crowd.stats) > 0 and crowd.chunks > 0
    assert served is STATES or crowd.found > 0
    for each in todo:
        assert_as_alone(served, crowd, alone(served, each), each.id)


def test_steps_that_overlap_give_the_same() -> None:
    rng = random.Random(5)
    todo = [random_contrasted(rng, number, TORCH) for number in range(6)]
    plain = TORCH.model()
    assert isinstance(plain, TorchRunnable)
    engine = bench(TORCH, blocks=24, step_tokens=11, running=6, model=OnDevice(plain.decoder)).engine
    found = run(engine, *todo)
    for each in todo:
        assert text(found[each.id]) == alone(TORCH, each).tokens[each.id]


@pytest.mark.parametrize("speculate", ["ngram", pytest.param("experts=1", marks=pytest.mark.redundant)])
def test_contrasted_sequences_get_no_drafts_and_others_keep_theirs(speculate: str) -> None:
    served = replace(TORCH, speculate=speculate)
    requests = [asked("a", new=28), replace(asked("b", None, new=28), prompt=(7, 8) * 5)]
    crowd = bench(served)
    for each in requests:
        crowd.engine.add(each)
    crowd.finish()
    assert sum(step.drafted for step in crowd.stats) > 0
    for each in requests:
        assert crowd.tokens[each.id] == alone(TORCH, each).tokens[each.id]
    only = bench(served)
    only.engine.add(requests[0])
    assert sum(step.drafted for step in only.finish().stats) == 0


def test_log_probabilities_are_of_the_contrasted_distribution() -> None:
    engine = bench(TORCH).engine
    plain = run(engine, asked(logprobs=4, prompt_logprobs=1, new=5))["a"]
    logits = alone(TORCH, asked(new=5)).logits["a"]
    for number, event in enumerate(plain):
        assert event.logprob is not None
        expected_V = logits[len(PROMPT) + number].log_softmax(-1)
        assert event.logprob.value == pytest.approx(float(expected_V[event.token or 0]), abs=1e-4)
        assert [token for token, _ in event.logprob.top] == expected_V.topk(4).indices.tolist()
    strong = run(engine, asked("b", None, prompt_logprobs=1, new=1))["b"][0].prompt_logprobs
    for found, expected in zip(plain[0].prompt_logprobs or (), strong or (), strict=True):
        assert found.value == pytest.approx(expected.value, abs=1e-5), "a prompt is scored by the strong row"


def test_settings_of_the_sampler_apply_to_contrasted_logits() -> None:
    """Seeds, penalties, biases: each as the sampler applies them to the logits that one row would have."""
    engine = bench(TORCH).engine
    base = text(run(engine, asked(temperature=1.0, new=20))["a"])
    assert base == text(run(engine, asked(temperature=1.0, new=20))["a"])
    assert base != text(run(engine, asked(temperature=1.0, new=20, seed=2))["a"])
    greedy = text(run(engine, asked(new=20))["a"])
    penalised = text(run(engine, asked(new=20, presence_penalty=2.0, frequency_penalty=2.0))["a"])
    assert len(set(penalised)) > len(set(greedy))
    first = greedy[0] or 0
    assert text(run(engine, asked(new=1, logit_bias=((first, -100.0),)))["a"]) != [first]
    stops = run(engine, asked(new=20, stop_token_ids=(first,)))["a"]
    assert (text(stops), stops[-1].finish) == ([first], "stop")


def test_where_the_valid_set_has_no_allowed_token_the_strong_row_decides() -> None:
    """`alpha` 1 leaves the best token alone; forbidden, it gives way to the strong row's next one."""
    strong = alone(TORCH, asked(contrast=None, new=1)).logits["a"][len(PROMPT)]
    order = strong.argsort(descending=True).tolist()
    allowed = tuple(sorted(order[5:9]))
    found = run(bench(TORCH).engine, asked(contrast=Contrast(5.0, 1.0), new=1, allowed_token_ids=allowed))["a"]
    assert text(found) == [order[5]]


def test_a_prefix_is_found_again_where_both_rows_have_it() -> None:
    engine = bench(TORCH).engine

    def cached(contrast: Contrast | None) -> int:
        stats = run(engine, asked(contrast=contrast, new=2))["a"][-1].stats
        assert stats is not None
        return stats.cached_tokens

    assert cached(CONTRAST) == 0
    assert cached(CONTRAST) == 8
    assert cached(Contrast(2.0, 0.5, RANK)) == 8, "beta and alpha change no keys and values"
    assert cached(Contrast(weak_rank=3)) == 0, "another rank does"
    assert cached(None) == 8, "the strong row is a plain one's"


def test_answers_of_one_prompt_share_both_rows_of_it() -> None:
    engine = bench(TORCH).engine
    answers = [replace(asked(str(number), temperature=1.0, seed=number, new=6), noise_seed=0) for number in range(3)]
    events = run(engine, *answers)
    cached = [own[-1].stats.cached_tokens for own in events.values() if own[-1].stats]
    assert cached == [0, 8, 8] and len({tuple(text(own)) for own in events.values()}) > 1


def test_the_work_of_both_rows_is_counted() -> None:
    engine, pairs, twice = bench(TORCH).engine, 0, 0
    engine.add(asked(new=6))
    stats = None
    while engine.has_work:
        report = engine.step()
        pairs, twice = pairs + report.stats.routed_pairs, twice + report.stats.contrast_tokens
        stats = report.events[-1].stats or stats
        assert report.stats.mixed
    tokens = len(PROMPT) + 5
    assert stats is not None and stats.computed_tokens == twice == tokens
    assert stats.routed_pairs == pairs == tokens * (sum(STRONG) + 2)
    assert stats.trained_pairs == tokens * 2 * 2, "what plain decoding at the trained count would have cost"


def test_measured_work_is_that_of_both_rows() -> None:
    rule = RoutingRule(threshold=0.6)
    both, plain = (
        run(bench(TORCH).engine, replace(each, budget=replace(each.budget, rule=rule)))["a"][-1].stats
        for each in (asked(new=1), asked(contrast=None, new=1))
    )
    assert both is not None and plain is not None
    assert both.routed_pairs == plain.routed_pairs + 2 * len(PROMPT), "the weak row runs one expert per layer"


def test_routes_are_those_of_the_strong_row() -> None:
    made = [
        run(bench(TORCH).engine, replace(each, return_routes=True))["a"][-1].routes
        for each in (asked(new=1), asked(contrast=None, new=1))
    ]
    assert made[0] is not None and made[0] == made[1]


def test_a_fault_ends_the_pair_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails as long as one request is in it runs again in parts, which never part the two rows."""
    engine = bench(TORCH).engine
    compute = engine.runner.run

    def failing(plan: Plan) -> StepResult:
        if any(chunk.sequence.id == "bad" for chunk in plan):
            raise ArithmeticError("secret")
        return compute(plan)

    monkeypatch.setattr(engine.runner, "run", failing)
    ends = {}
    for each in (asked("a"), asked("bad"), asked("b", None)):
        engine.add(replace(each, salt=each.id))
    found: dict[str, list[int]] = {"a": [], "b": [], "bad": []}
    while engine.has_work:
        for event in engine.step().events:
            found[event.request_id] += [] if event.token is None else [event.token]
            ends[event.request_id] = event.finish
    engine.scheduler.check()
    assert ends == {"a": "length", "b": "length", "bad": "error"} and engine.scheduler.blocks.used == 0
    assert found["a"] == alone(TORCH, asked()).tokens["a"]


def refused(engine: Engine, request: Request) -> tuple[str | None, str]:
    with pytest.raises(InvalidRequest) as error:
        engine.add(request)
    assert not engine.has_work
    return error.value.param, error.value.message


@pytest.mark.parametrize(
    ("contrast", "field", "limit"),
    [
        (Contrast(beta=11), "beta", "between 0 and 10"),
        (Contrast(beta=-0.1), "beta", "between 0 and 10"),
        (Contrast(beta=float("nan")), "beta", "between 0 and 10"),
        (Contrast(alpha=0.0), "alpha", "above 0"),
        (Contrast(alpha=1.5), "alpha", "at most 1"),
        (Contrast(weak_rank=0), "weak_rank", "between 1 and 6"),
        (Contrast(weak_rank=7), "weak_rank", "between 1 and 6"),
    ],
)
def test_limits_name_value_and_field(contrast: Contrast, field: str, limit: str) -> None:
    param, message = refused(bench(TORCH).engine, asked(contrast=contrast))
    assert param == f"experts.contrast.{field}" and limit in message
    assert repr(getattr(contrast, field)) in message


def test_models_that_cannot_are_refused_by_name() -> None:
    draws = bench(replace(TORCH, config=llama_like(infinity(), infinity()))).engine
    param, message = refused(draws, asked())
    assert param == "experts.contrast" and "draws" in message


def test_a_batch_or_a_cache_with_room_for_one_row_is_not_enough() -> None:
    param, message = refused(bench(TORCH, blocks=10, running=1).engine, asked())
    assert param == "experts.contrast" and "2 rows" in message
    engine = bench(TORCH, blocks=10).engine
    param, message = refused(engine, asked(new=20))
    assert param == "max_tokens" and "at most 20 tokens of a request with experts.contrast" in message
    assert len(run(engine, asked(new=10))["a"]) == 10


def test_two_rows_count_twice_in_the_batch_and_in_the_step() -> None:
    """The second pair waits although one row is free, and nothing passes it."""
    scheduler = Scheduler(BlockManager(64, 2, prefix_cache=False), max_running=3, max_step_tokens=8, max_model_len=40)
    for id, contrast in (("a", Contrast()), ("b", Contrast()), ("c", None)):
        scheduler.add(request(id, (1, 2, 3, 4, 5, 6), 2, contrast=contrast))
    runner, planned = FakeRunner(2), list[list[tuple[str, int]]]()
    while scheduler.has_work:
        plan = scheduler.schedule()
        planned.append([(chunk.sequence.id, chunk.length) for chunk in plan])
        scheduler.commit(plan, runner.run(plan).sampled)
        scheduler.check()
    assert planned[:3] == [[("a", 4)], [("a", 2)], [("a", 1)]]
    assert planned[3:] == [[("b", 4)], [("b", 2)], [("b", 1), ("c", 6)], [("c", 1)]]


def test_rows_of_a_plan_are_neighbours() -> None:
    engine = bench(TORCH).engine
    engine.add(asked())
    plan = engine.scheduler.schedule()
    own, weak = rows_of(plan)
    assert (own.start, own.length) == (weak.start, weak.length) and own.sequence.slot != weak.sequence.slot
    assert not set(own.sequence.blocks) & set(weak.sequence.blocks)
    engine.scheduler.fail(plan, "enough")
