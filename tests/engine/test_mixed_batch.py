"""The product's promise: in a mixed batch every request gets the tokens and logits of running alone.

Real engine, scheduler, runner and tiny float32 models. Requests join and leave at random; prompts are cut into chunks,
memory runs out, prefixes are found again.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from engine.build import assemble
from engine.engine import Engine
from engine.plan import Plan
from engine.runner import ModelRunner, Tally
from engine.types import EngineSettings, Finish, Request, Sampling, StepStats
from model.attend import PagedCache
from model.budget import ExpertBudget
from model.config import DecoderConfig, Dense
from model.decoder import Decoder
from tests.model.tiny import VOCABULARY, decoder, gpt2_like, infinity, llama_like, topk

LENGTH, BLOCK = 40, 4
LAYOUTS: dict[str, DecoderConfig] = {
    "topk": llama_like(topk(normalise=True), topk(), qk_norm="full", context=LENGTH),
    "infinity": llama_like(infinity(), infinity(), context=LENGTH),
    "infinity-units": gpt2_like(infinity(block=1, draws="antithetic"), infinity(block=1), context=LENGTH),
    "both": gpt2_like(Dense(20, "gelu"), topk(), infinity(), context=LENGTH),
}
each_layout = pytest.mark.parametrize("name", LAYOUTS)


@dataclass
class Bench:
    """An engine that keeps what every request got: its tokens, the logits behind each, and how it ended."""

    engine: Engine
    tokens: dict[str, list[int]] = field(default_factory=dict)
    logits: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    ends: dict[str, Finish] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    stats: list[StepStats] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)  # Σ over tokens and layers of the counts, per step
    chunks: int = 0  # spans that did not reach their sequence's end

    def watch(self, runner: ModelRunner) -> None:
        forward = runner.forward

        def watched(plan: Plan, tally: Tally) -> Tensor:
            logits_BV = forward(plan, tally)
            sampling = [chunk.sequence for chunk in plan if chunk.samples]
            for sequence, row in zip(sampling, logits_BV, strict=True):
                self.logits.setdefault(sequence.id, {})[len(sequence.tokens)] = row.clone()
            self.computed.append(sum(c.length * sum(c.sequence.request.budget.per_layer) for c in plan))
            self.chunks += len(plan) - len(sampling)
            return logits_BV

        runner.forward = watched  # type: ignore[method-assign]

    def step(self) -> None:
        report = self.engine.step()
        self.engine.scheduler.check()
        self.stats.append(report.stats)
        for event in report.events:
            assert event.error is None
            if event.token is not None:
                self.tokens.setdefault(event.request_id, []).append(event.token)
            if event.finish is not None:
                self.ends[event.request_id] = event.finish
                self.cached[event.request_id] = event.stats.cached_tokens if event.stats else -1

    def finish(self) -> "Bench":
        while self.engine.has_work:
            self.step()
        return self


def bench(model: Decoder, blocks: int = 60, step_tokens: int = 64, running: int = 8, cache: bool = True) -> Bench:
    config = model.config
    per_block = PagedCache.bytes_per_block(len(config.layers), BLOCK, config.kv_heads, config.head_width, torch.float32)
    engine, total = assemble(
        model,
        EngineSettings(
            model="",
            block_size=BLOCK,
            kv_cache_bytes=blocks * per_block,
            max_running=running,
            max_step_tokens=step_tokens,
            prefix_cache=cache,
        ),
    )
    assert total == blocks
    made = Bench(engine)
    made.watch(engine._runner)  # type: ignore[arg-type]
    return made


def alone(model: Decoder, request: Request) -> Bench:
    made = bench(model, cache=False)
    made.engine.add(request)
    return made.finish()


def random_request(rng: random.Random, id: int, layers: int) -> Request:
    """Prompts often share a beginning; counts differ per layer; half of the requests are greedy."""
    beginning = [(7 * family + i) % VOCABULARY for family in (rng.randrange(3),) for i in range(rng.randint(0, 14))]
    prompt = [*beginning, *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9)))]
    budget = rng.choice([(1,) * layers, (2,) * layers, tuple(rng.randint(1, 6) for _ in range(layers))])
    sampling = Sampling(
        max_tokens=rng.randint(1, LENGTH - len(prompt)),
        seed=rng.choice([1, 2, -3, 2**62]),
        temperature=rng.choice([0.0, 0.0, 0.9, 1.3]),
        top_k=rng.choice([0, 20]),
        frequency_penalty=rng.choice([0.0, 0.4]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        stop_token_ids=(rng.randrange(VOCABULARY),),
    )
    return Request(str(id), tuple(prompt), ExpertBudget(budget), sampling)


def storm(model: Decoder, seed: int, requests: int = 26) -> tuple[Bench, list[Request]]:
    """Requests join at random moments; every sixth or so leaves before its end."""
    rng, layers = random.Random(seed), len(model.config.mixtures)
    crowd = bench(model, blocks=15, step_tokens=11, running=6)
    todo = [random_request(rng, id, layers) for id in range(requests)]
    waiting = list(todo)
    while waiting or crowd.engine.has_work:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if waiting:
                crowd.engine.add(waiting.pop())
        if rng.random() < 0.06:
            crowd.engine.abort(str(rng.randrange(requests)))
        crowd.step()
    return crowd, todo


def assert_as_alone(crowd: Bench, single: Bench, id: str) -> None:
    tokens, ended = crowd.tokens.get(id, []), crowd.ends[id]
    expected = single.tokens[id]
    assert tokens == (expected[: len(tokens)] if ended == "abort" else expected)
    assert ended in ("abort", single.ends[id])
    for position, row in crowd.logits.get(id, {}).items():
        torch.testing.assert_close(row, single.logits[id][position], atol=1e-5, rtol=0)


@each_layout
@pytest.mark.parametrize("seed", [1, 2])
def test_a_mixed_batch_gives_what_running_alone_gives(name: str, seed: int) -> None:
    model = decoder(LAYOUTS[name])
    crowd, requests = storm(model, seed)
    for request in requests:
        assert_as_alone(crowd, alone(model, request), request.id)
    assert crowd.ends.keys() == {request.id for request in requests}
    # The storm was one: else the equality above would say little.
    assert sum(stats.preemptions for stats in crowd.stats) > 2
    assert sum(stats.prefix_hits for stats in crowd.stats) > 0
    assert sum(stats.mixed for stats in crowd.stats) > 20
    assert crowd.chunks > 2
    assert Counter(crowd.ends.values())["abort"] >= 1
    assert crowd.engine.scheduler.blocks.used == 0


@each_layout
def test_work_is_the_sum_of_the_counts(name: str) -> None:
    crowd, _ = storm(decoder(LAYOUTS[name]), seed=3, requests=10)
    assert [stats.routed_pairs for stats in crowd.stats if stats.routed_pairs] == crowd.computed
    assert sum(crowd.computed) > 0


def test_the_saving_is_counted_against_the_trained_count() -> None:
    model = decoder(LAYOUTS["topk"])
    single = alone(model, Request("a", (1, 2, 3, 4, 5), ExpertBudget((1, 1)), Sampling(max_tokens=3, seed=0)))
    computed = 5 + 2  # the third new token is returned and never computed
    assert sum(stats.routed_pairs for stats in single.stats) == computed * 2
    assert sum(stats.trained_pairs for stats in single.stats) == computed * 4
    assert all(2 <= stats.distinct_experts <= 12 for stats in single.stats)


@pytest.mark.parametrize("name", ["infinity", "infinity-units"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_seed_same_answer_whatever_the_circumstances(name: str, temperature: float) -> None:
    model = decoder(LAYOUTS[name])
    prompt = tuple(range(13))
    sampling = Sampling(max_tokens=20, seed=11, temperature=temperature)
    request = Request("a", prompt, ExpertBudget((3, 2)), sampling)
    expected = alone(model, request)
    others = [Request(str(n), prompt[:n], ExpertBudget((6, 1)), Sampling(25, seed=n, temperature=0)) for n in (2, 7, 9)]
    for step_tokens, blocks, company in [(8, 60, []), (9, 60, others), (64, 10, others), (8, 14, others)]:
        crowd = bench(model, blocks, step_tokens)
        for number in range(2):  # the second time the prefix is found
            again = Request(f"again{number}", request.prompt, request.budget, sampling)
            for other in company:
                crowd.engine.add(Request(f"{other.id}-{number}", other.prompt, other.budget, other.sampling))
            crowd.engine.add(again)
            crowd.finish()
            assert crowd.tokens[again.id] == expected.tokens["a"]
    different = alone(model, Request("a", prompt, request.budget, Sampling(20, seed=12, temperature=temperature)))
    row = len(prompt)
    assert (different.logits["a"][row] - expected.logits["a"][row]).abs().max() > 1e-3


def hits(model: Decoder, first: Request, second: Request) -> tuple[int, bool]:
    """How many prompt tokens the second finds of the first, and whether both then run on shared blocks."""
    made = bench(model)
    made.engine.add(first)
    made.step()
    made.engine.add(second)
    made.step()
    running = made.engine.scheduler._running
    shared = bool(set(running["a"].blocks) & set(running["b"].blocks))
    made.finish()
    return made.cached["b"], shared


def pair(budgets: tuple[tuple[int, ...], tuple[int, ...]], seeds: tuple[int, int]) -> tuple[Request, Request]:
    sampling = [Sampling(max_tokens=4, seed=seed, temperature=0) for seed in seeds]
    return (
        Request("a", tuple(range(14)), ExpertBudget(budgets[0]), sampling[0]),
        Request("b", tuple(range(14)), ExpertBudget(budgets[1]), sampling[1]),
    )


@each_layout
def test_same_prompt_and_budget_share_blocks(name: str) -> None:
    assert hits(decoder(LAYOUTS[name]), *pair(((2, 3), (2, 3)), (5, 5))) == (12, True)


@each_layout
@pytest.mark.parametrize("other", [(1, 3), (2, 4), (3, 2)])
def test_same_prompt_and_another_count_never_share(name: str, other: tuple[int, ...]) -> None:
    assert hits(decoder(LAYOUTS[name]), *pair(((2, 3), other), (5, 5))) == (0, False)


@each_layout
def test_another_seed_shares_only_where_no_noise_is_drawn(name: str) -> None:
    model = decoder(LAYOUTS[name])
    expected = (0, False) if model.config.draws_noise else (12, True)
    assert hits(model, *pair(((2, 3), (2, 3)), (5, 6))) == expected


@pytest.mark.parametrize("name", ["topk", "infinity"])
def test_a_request_that_is_not_finite_fails_alone(name: str) -> None:
    """Neither beside it nor later, on the blocks that it leaves behind, is anybody touched."""
    model = decoder(LAYOUTS[name])
    model.embed.weight[VOCABULARY - 1] = torch.nan
    sampling = Sampling(max_tokens=12, seed=1, temperature=0, logit_bias=((VOCABULARY - 1, -100.0),))
    good, late, bad = (
        Request(id, prompt, ExpertBudget((2, 2)), sampling)
        for id, prompt in [("good", (1, 2, 3)), ("late", tuple(range(9))), ("bad", (4, VOCABULARY - 1))]
    )
    engine = bench(model, blocks=10).engine
    for request in (bad, good, late):
        engine.add(request)
    events = []
    while engine.has_work:
        events += engine.step().events
    assert {event.request_id: event.finish for event in events if event.finish} == {
        "bad": "error",
        "good": "length",
        "late": "length",
    }
    for request in (good, late):
        tokens = [event.token for event in events if event.request_id == request.id]
        assert tokens == alone(model, request).tokens[request.id]
