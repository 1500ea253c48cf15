"""What is guessed, when guessing stops, and that nothing else of a plan changes for it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.blocks import BlockManager
from engine.cost import ExpertPool, StepBudget, StepCost
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.speculation import MAX_DRAFTS, PRIORS, Speculator, speculator_of
from model.errors import InvalidRequest
from tests.engine.fake import FakeRunner, request
from tests.engine.test_scheduler import finish, text

CHEAP = StepCost(fixed=1.0, per_token=0.01, per_pair=0.0, per_expert=0.0, pools=(ExpertPool(8),))
DEAR = StepCost(fixed=0.0, per_token=1.0, per_pair=0.0, per_expert=0.0, pools=(ExpertPool(8),))


def sequence(*tokens: int, output: int = 1, **options: object) -> Sequence:
    made = Sequence(request("a", tokens[: len(tokens) - output], max_tokens=50, **options), 0.0)  # type: ignore[arg-type]
    made.tokens += tokens[len(tokens) - output :]
    return made


def step_budget(cost: StepCost = CHEAP) -> StepBudget:
    return StepBudget(cost, 64, float("inf"), 1)


def proposed(of: Sequence, most: int = 4) -> tuple[int, ...]:
    speculator = Speculator()
    speculator.propose(of, 1, step_budget())
    of.draft_state.rates = dict.fromkeys(PRIORS, 1.0)  # type: ignore[attr-defined]
    return speculator.propose(of, most, step_budget())


def test_what_followed_last_time_is_guessed() -> None:
    assert proposed(sequence(1, 2, 3, 4, 5, 9, 1, 2)) == (3, 4, 5, 9)
    assert proposed(sequence(1, 2, 3, 7, 1, 2, 4, 7, 1, 2)) == (4, 7, 1, 2), "the last time counts"
    assert proposed(sequence(8, 1, 2, 5, 9, 1, 2, 6, 8, 1, 2)) == (5, 9, 1, 2), "the longest run counts"
    assert proposed(sequence(1, 2, 3, 4)) == ()


def test_what_repeats_itself_goes_on() -> None:
    assert proposed(sequence(5, 1, 2, 1, 2), most=6) == (1, 2, 1, 2, 1, 2)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(1, 6))
def test_guesses_follow_an_earlier_occurrence(tokens: list[int], most: int) -> None:
    guesses = proposed(sequence(*tokens), most)
    assert len(guesses) <= most
    endings = [tokens[:end] for end in range(2, len(tokens))]
    followed = [tokens[len(head)] for head in endings if head[-2:] == tokens[-2:]]
    assert bool(guesses) == bool(followed) and (not guesses or guesses[0] in followed)


@pytest.mark.parametrize(
    "options", [{"presence_penalty": 1.0}, {"repetition_penalty": 1.1}, {"min_tokens": 5}, {"bad_words": ((5,),)}]
)
def test_nothing_is_guessed_where_a_guess_changes_what_may_follow(options: dict[str, Any]) -> None:
    assert proposed_or_none(sequence(1, 2, 1, 2, **options)) == ()


def proposed_or_none(of: Sequence) -> tuple[int, ...]:
    return Speculator().propose(of, 4, step_budget())


def test_guessing_stops_where_it_does_not_pay_and_is_tried_again() -> None:
    speculator, of = Speculator(), sequence(1, 2, 1, 2)
    speculator.seconds_per_token = 1.0
    assert speculator.propose(of, 8, step_budget(CHEAP))
    assert speculator.propose(of, 8, step_budget(DEAR)) == ()
    some = StepCost(fixed=1.0, per_token=0.15, per_pair=0.0, per_expert=0.0, pools=(ExpertPool(8),))
    steps = []
    for _ in range(2000):
        guesses = speculator.propose(of, 8, step_budget(some))
        speculator.record_acceptance(of, len(guesses), 0)
        steps.append(len(guesses))
    assert 0 < sum(steps[100:]) < 150, "wrong guesses are rarely repeated, but now and then"


def test_the_better_the_guesses_the_longer() -> None:
    speculator, of = Speculator(), sequence(1, 2, 1, 2)
    speculator.seconds_per_token = 0.05
    before = len(speculator.propose(of, MAX_DRAFTS, step_budget(CHEAP)))
    for _ in range(20):
        speculator.propose(of, MAX_DRAFTS, step_budget(CHEAP))
        speculator.record_acceptance(of, 4, 4)
    assert before < len(speculator.propose(of, MAX_DRAFTS, step_budget(CHEAP))) == MAX_DRAFTS


class Truth(Speculator):
    """Always right."""

    def __init__(self, runner: FakeRunner) -> None:
        super().__init__()
        self.runner = runner

    def propose(self, sequence: Sequence, most: int, step_budget: StepBudget) -> tuple[int, ...]:
        return tuple(self.runner.reference(sequence.request)[sequence.output_count :][: max(0, min(4, most))])


def test_right_guesses_save_steps_and_change_nothing() -> None:
    runner = FakeRunner(4)
    scheduler = Scheduler(BlockManager(64, 4), 4, 32, 200, speculator=Truth(runner))
    asked = request("a", (1, 2, 3), max_tokens=21)
    scheduler.add(asked)
    steps = drafted = accepted = 0
    events = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        events += scheduler.commit(plan, runner.run(plan).sampled)
        drafted, accepted = drafted + scheduler.plan_stats.drafted, accepted + scheduler.plan_stats.accepted
        steps += 1
        scheduler.check()
    assert text(events) == runner.reference(asked) and steps == 1 + 20 / 5
    assert (drafted, accepted) == (16, 16)


def test_nobody_loses_a_token_or_a_block_to_guesses() -> None:
    runner = FakeRunner(4)
    scheduler = Scheduler(BlockManager(9, 4), 4, 4, 40, speculator=Truth(runner))
    requests = [request(str(n), (n,), max_tokens=7) for n in range(4)]
    for each in requests:
        scheduler.add(each)
    events = finish(scheduler, runner)
    assert [text(events[each.id]) for each in requests] == [runner.reference(each) for each in requests]
    assert all(event.stats.preemptions == 0 for found in events.values() for event in found if event.stats)


def test_settings() -> None:
    assert speculator_of("off") is None
    assert (speculator_of("ngram").experts, speculator_of("experts=2").experts) == (0, 2)  # type: ignore[union-attr]
    assert speculator_of("grammar").propose(sequence(1, 2, 1, 2), 4, step_budget()) == ()  # type: ignore[union-attr]
    for wrong in ("", "on", "experts", "experts=0", "experts=-1", "experts=x"):
        with pytest.raises(InvalidRequest, match="off, grammar, ngram or experts=K"):
            speculator_of(wrong)
