"""Steps that overlap on a real model: the answers of an engine that waits for every step, token for token.

Plain torch stands for the device: it computes at once, but the runner reads nothing back before it must, and samples
where the logits are.
"""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.engine import Engine
from engine.types import Finish, Logprob, Request, Routes, Sampling, TokenEvent
from model.backends.torch.backend import TorchRunnable
from model.batch import Batch, Pages
from model.budget import ExpertBudget, RoutingRule
from model.step import Observer
from tests.engine.random_workload import Served, bench, random_request
from tests.engine.test_mixed_batch import RULES, TORCH
from tests.model.tiny import VOCABULARY


class OnDevice(TorchRunnable):
    """Plain torch whose steps overlap. Logits that the host asks for are an error."""

    @property
    def overlaps(self) -> bool:
        return True

    def __call__(self, batch: Batch, pages: Pages, observer: Observer | None = None) -> Tensor:
        raise AssertionError("the host reads logits")


def run(engine: Engine, requests: list[Request], seed: int) -> dict[str, list[TokenEvent]]:
    """Requests join at random moments; some leave before their end."""
    rng, events = random.Random(seed), {each.id: list[TokenEvent]() for each in requests}
    waiting = list(requests)
    for _ in range(5000):
        if not waiting and not engine.has_work:
            engine.scheduler.check()
            return events
        for _ in range(rng.choice([0, 0, 1, 3])):
            if waiting:
                engine.add(waiting.pop())
        for event in engine.step().events:
            assert event.error is None
            events[event.request_id].append(event)
    raise AssertionError("there is still work")


def both(served: Served, requests: list[Request], seed: int = 0, **options: Any) -> list[dict[str, list[TokenEvent]]]:
    """The events of an engine that waits for its steps, and of one whose steps overlap."""
    plain = served.model()
    assert isinstance(plain, TorchRunnable)
    models = (plain, OnDevice(plain.decoder))
    return [run(bench(served, model=model, **options).engine, requests, seed) for model in models]


def tokens(events: list[TokenEvent]) -> list[int | None]:
    return [event.token for event in events]


@pytest.mark.parametrize("name", TORCH)
def test_answers_are_those_of_steps_that_are_waited_for(name: str) -> None:
    served = replace(TORCH[name], rules=RULES if name == "topk" else TORCH[name].rules)
    rng = random.Random(5)
    requests = [random_request(rng, number, served) for number in range(14)]
    waited, overlapped = both(served, requests, blocks=served.few + 8, step_tokens=11, running=5)
    for each in requests:
        assert tokens(overlapped[each.id]) == tokens(waited[each.id])
        assert overlapped[each.id][-1].finish == waited[each.id][-1].finish


def test_log_probabilities_of_prompts_and_answers_and_routes_are_the_same() -> None:
    served = TORCH["topk"]
    rng = random.Random(3)
    requests = []
    for number in range(6):
        prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(3, 14)))
        sampling = Sampling(6 * (number != 4), seed=number, temperature=number % 2, logprobs=3, prompt_logprobs=2)
        budget = ExpertBudget((1 + number % 4,) * 2, (), RoutingRule(threshold=0.4 * (number % 2)))
        requests.append(Request(str(number), prompt, budget, sampling, return_routes=number % 3 == 0))
    waited, overlapped = both(served, requests, step_tokens=8)
    for each in requests:
        for found, expected in zip(overlapped[each.id], waited[each.id], strict=True):
            assert (found.token, found.finish) == (expected.token, expected.finish)
            assert_close(found.logprob, expected.logprob)
            for pair in zip(found.prompt_logprobs or (), expected.prompt_logprobs or (), strict=True):
                assert_close(*pair)
            assert same_routes(found.routes, expected.routes)
        last, other = overlapped[each.id][-1].stats, waited[each.id][-1].stats
        assert last is not None and other is not None
        assert (last.computed_tokens, last.routed_pairs) == (other.computed_tokens, other.routed_pairs)


def assert_close(found: Logprob | None, expected: Logprob | None) -> None:
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.value == pytest.approx(expected.value, abs=1e-4)
        assert [token for token, _ in found.top] == [token for token, _ in expected.top]


def same_routes(found: Routes | None, expected: Routes | None) -> bool:
    return found == expected


def test_a_row_that_is_not_finite_ends_its_request_alone() -> None:
    served = TORCH["topk"]
    plain = served.model()
    assert isinstance(plain, TorchRunnable)
    model = OnDevice(plain.decoder)
    launch = model.launch

    def poisoned(batch, pages, observer=None):  # type: ignore[no-untyped-def]
        logits_BV = launch(batch, pages, observer)
        ids = batch.to(torch.device("cpu")).ids_T[batch.rows_B]
        return logits_BV.masked_fill((ids == 7)[:, None], torch.nan)

    model.launch = poisoned  # type: ignore[method-assign]
    engine = bench(served, model=model).engine
    budget = ExpertBudget((2, 2))
    for id, prompt in (("bad", (1, 7)), ("good", (1, 2, 3))):
        engine.add(Request(id, prompt, budget, Sampling(5, seed=1, logit_bias=((7, -100.0),))))
    ends: dict[str, Finish] = {}
    while engine.has_work:
        ends |= {event.request_id: event.finish for event in engine.step().events if event.finish}
    assert ends == {"bad": "error", "good": "length"}
