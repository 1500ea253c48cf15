"""Requests that join and leave an engine at random, and what each of them got: for tests of the product's promise.

`Served` is a tiny model in one of the forms that an engine runs, with a cache small enough that its requests collide.
"""

import random
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from engine.assembly import assemble
from engine.build import prepare
from engine.calibrate import MAX_ROWS
from engine.engine import Engine
from engine.expert_stats import ExpertStats
from engine.plan import Plan
from engine.runner import ModelRunner
from engine.sequence import Sequence
from engine.types import EngineSettings, Finish, Request, Sampling, StepStats
from model.backends.base import Runnable
from model.backends.torch.backend import TorchRunnable
from model.budget import FAMILY_RULE, ExpertBudget, RoutingRule
from model.decoder import Decoder
from model.shapes.decoder import DecoderConfig
from model.shapes.memory import bytes_per_block, bytes_per_sequence
from tests.model.tiny import VOCABULARY, decoder
from weights.repair import give_tables, neutral_tables


@dataclass(frozen=True)
class Served:
    """A model, on plain torch or on native kernels. `few` blocks of the cache are what one sequence needs."""

    config: DecoderConfig
    block: int
    few: int
    requests: int  # so many make a storm
    native: bool = False
    dtype: torch.dtype = torch.float32
    quantize: Literal["none", "int8", "int8-weights", "int4"] = "none"
    by_phase: bool = False  # many requests have counts of their own for prompts
    rules: tuple[RoutingRule, ...] = (FAMILY_RULE,)  # each request has one of these
    speculate: str = "off"  # of crowds; what runs alone is never guessed at
    snapshots: int = 0  # of states, where layers keep some
    snapshot_tokens: int = 1

    @property
    def length(self) -> int:
        return self.config.context

    def settings(self, **changes: int | bool | str) -> EngineSettings:
        fixed = {"quantize": self.quantize, "quantize_layers": "all"}
        return EngineSettings(model="", block_size=self.block, **fixed | changes)  # type: ignore[arg-type]

    def prepared(self, model: Decoder) -> Runnable:
        """In the form that is served; a native one takes the model over."""
        if not self.native:
            return TorchRunnable(model)
        made, reason = prepare(model.to(self.dtype), self.settings())
        assert made.exact, reason
        return made

    @cache  # noqa: B019 - as many as there are layouts
    def model(self) -> Runnable:
        return self.prepared(with_statistics(decoder(self.config)))

    def assert_same(self, row_V: Tensor, expected_V: Tensor) -> None:
        """Native kernels promise equal bits, torch's own as much as its matrix library does."""
        if self.native:
            assert torch.equal(row_V, expected_V)
        else:
            # Products of other heights are rounded otherwise; another sequence's token would change the second digit.
            # Contrasted logits of -1e5 are as coarse as float32 is there.
            torch.testing.assert_close(row_V, expected_V, atol=5e-5, rtol=2e-7)


def with_statistics(model: Decoder) -> Decoder:
    """The model with random statistics for repair."""
    scale_LKD, shift_LKD = neutral_tables(model.config)
    generator = torch.Generator().manual_seed(6)
    below_LKD = slice(None), slice(1, model.config.experts.trained)
    for table_LKD in (scale_LKD, shift_LKD):
        table_LKD[below_LKD] += 0.3 * torch.randn(table_LKD[below_LKD].shape, generator=generator)
    give_tables(model, scale_LKD, shift_LKD)
    model.config = replace(model.config, repaired=tuple(range(1, model.config.experts.trained)))
    return model


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
    found: int = 0  # tokens of the prefix cache with which sequences began, or began again after a preemption
    last: set[str] = field(default_factory=set)  # ids in the last plan

    def watch(self, runner: ModelRunner) -> None:
        forward = runner.forward

        def watched(plan: Plan, expert_stats: ExpertStats) -> Tensor:
            logits_BV = forward(plan, expert_stats)
            row = 0
            for chunk in plan:
                if chunk.samples:  # the rows after it depend on whether guesses are right
                    self.logits.setdefault(chunk.sequence.id, {})[len(chunk.sequence.tokens)] = logits_BV[row].clone()
                    row += 1 + len(chunk.drafts)
            self.computed.append(sum(sum(map(sum, counts_of(c.sequence, c.start, len(c.tokens)))) for c in plan))
            self.chunks += sum(not chunk.reaches_end for chunk in plan)
            self.found += sum(chunk.start for chunk in plan if chunk.sequence.id not in self.last)
            self.last = {chunk.sequence.id for chunk in plan}
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


def bench(
    served: Served,
    blocks: int = 40,
    step_tokens: int = 64,
    running: int = 8,
    cache: bool = True,
    model: Runnable | None = None,
) -> Bench:
    """`model`: another than the one that is served to all."""
    model, config = model or served.model(), served.config
    cache = cache and (served.snapshots > 0 or not config.has_states)
    states = max(running, MAX_ROWS) + (served.snapshots if cache else 0)
    per_block = bytes_per_block(config.memory, served.block, model.dtype.itemsize)
    settings = served.settings(
        kv_cache_bytes=blocks * per_block + bytes_per_sequence(config.memory) * states,
        max_running=running,
        max_step_tokens=step_tokens,
        prefix_cache=cache,
        prefix_snapshots=served.snapshots,
        prefix_snapshot_tokens=served.snapshot_tokens,
        speculate=served.speculate,
    )
    engine, total = assemble(model, settings)
    assert total == blocks
    made = Bench(engine)
    made.watch(engine.runner)  # type: ignore[arg-type]
    return made


def alone(served: Served, request: Request, model: Runnable | None = None) -> Bench:
    made = bench(replace(served, speculate="off"), cache=False, model=model or served.model())
    made.engine.add(request)
    return made.finish()


def random_request(rng: random.Random, id: int, served: Served) -> Request:
    """Prompts often share a beginning; counts differ per layer; half of the requests are greedy."""
    shared, layers = rng.randint(0, 7 * served.block // 2), len(served.config.mixtures)
    beginning = [(7 * family + i) % VOCABULARY for family in (rng.randrange(3),) for i in range(shared)]
    prompt = [*beginning, *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9)))]
    budget = rng.choice([(1,) * layers, (2,) * layers, tuple(rng.randint(1, 6) for _ in range(layers))])
    sampling = Sampling(
        max_tokens=rng.randint(1, served.length - len(prompt)),
        seed=rng.choice([1, 2, -3, 2**62]),
        temperature=rng.choice([0.0, 0.0, 0.9, 1.3]),
        top_k=rng.choice([0, 20]),
        frequency_penalty=rng.choice([0.0, 0.4]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        stop_token_ids=(rng.randrange(VOCABULARY),),
    )
    prefill = rng.choice([(), (1,) * layers, (3,) * layers]) if served.by_phase else ()
    rule = rng.choice(served.rules) if len(served.rules) > 1 else served.rules[0]
    left = min((layer.count("1") for layer in rule.kept), default=6) - rule.skip  # experts that it may run
    return Request(str(id), tuple(prompt), ExpertBudget(budget, prefill, rule).at_most(left), sampling)


def counts_of(sequence: Sequence, start: int, length: int) -> list[tuple[int, ...]]:
    """The rule of a budget said once more: the counts of `length` tokens from position `start` on."""
    budget, prompt = sequence.request.budget, len(sequence.request.prompt)
    positions = range(start, start + length)
    return [budget.prefill or budget.per_layer if each < prompt else budget.per_layer for each in positions]


def storm(served: Served, seed: int, requests: int) -> tuple[Bench, list[Request]]:
    """Requests join at random moments; every sixth or so leaves before its end."""
    rng = random.Random(seed)
    crowd = bench(served, blocks=served.few + (1 if served.native else 5), step_tokens=11, running=6)
    todo = [random_request(rng, id, served) for id in range(requests)]
    waiting = list(todo)
    while waiting or crowd.engine.has_work:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if waiting:
                crowd.engine.add(waiting.pop())
        if rng.random() < 0.06:
            crowd.engine.abort(str(rng.randrange(requests)))
        crowd.step()
    return crowd, todo


def assert_as_alone(served: Served, crowd: Bench, single: Bench, id: str) -> None:
    tokens, ended = crowd.tokens.get(id, []), crowd.ends[id]
    expected = single.tokens[id]
    assert tokens == (expected[: len(tokens)] if ended == "abort" else expected)
    assert ended in ("abort", single.ends[id])
    for position, row_V in crowd.logits.get(id, {}).items():
        served.assert_same(row_V, single.logits[id][position])
