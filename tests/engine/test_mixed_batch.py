"""The product's promise: in a mixed batch every request gets the tokens and logits of running alone.

Real engine, scheduler, runner and tiny models, on plain torch and on native kernels. Requests join and leave at random;
prompts are cut into chunks, memory runs out, prefixes are found again.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from itertools import product

import pytest
import torch

from engine.types import Request, Sampling
from model.backends.cpu.kernels.library import load
from model.budget import FAMILY_RULE, ExpertBudget, RoutingRule
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense
from tests.engine.random_workload import Served, alone, assert_as_alone, bench, storm
from tests.model.tiny import VOCABULARY, PagedRun, decoder, gpt2_like, infinity, llama_like, topk


def layouts(context: int, head_width: int, block: int) -> dict[str, DecoderConfig]:
    """`block`: of ∞-MoE's units."""
    size = {"context": context, "head_width": head_width}
    return {
        "topk": llama_like(topk(normalise=True), topk(), qk_norm="full", **size),
        "infinity": llama_like(infinity(block=block), infinity(block=block), **size),
        "infinity-units": gpt2_like(infinity(block=1, draws="antithetic"), infinity(block=1), **size | {"width": 32}),
        "both": gpt2_like(Dense(20, "gelu"), topk(), infinity(), **size),
    }


TORCH = {name: Served(config, block=4, few=10, requests=26) for name, config in layouts(40, 6, 4).items()}
NATIVE = {
    f"native-{name}": Served(config, block=16, few=5, requests=60, native=True)
    for name, config in layouts(80, 16, 16).items()
}
PRECISIONS = [
    (torch.bfloat16, "none"),
    (torch.float32, "int8"),
    (torch.bfloat16, "int8"),
    (torch.bfloat16, "int8-weights"),
    (torch.float32, "int4"),
]
LAYOUTS = TORCH | NATIVE
GUESSED = [
    *(("experts=1", name) for name in LAYOUTS if not name.endswith("units")),
    *(("ngram", name) for name in ("both", "native-topk", "native-infinity", "native-both")),
]
REPAIR = (FAMILY_RULE, RoutingRule(repair=True))
RULES = (
    *REPAIR,
    *(RoutingRule(normaliser) for normaliser in ("raw", "kept", 5)),
    RoutingRule(threshold=0.5),
    RoutingRule("kept", top_p=0.6, repair=True),
    RoutingRule(skip=1),
    RoutingRule("raw", kept=("111011", "011111")),
)
RULED = {"topk": RULES, "infinity": REPAIR, "native-topk": RULES, "native-infinity": REPAIR, "native-both": REPAIR}
PLAIN = [("off", name) for name in ("topk", "infinity", "native-topk", "native-infinity", "native-both")]
LIKE_BOTH = pytest.mark.redundant  # "both" has the two mixtures in one model
# Of the storms of one more circumstance, those of a single mixture.
SINGLE = tuple(name for name in LAYOUTS if not name.endswith("both"))
ROUNDED = {
    f"{name}-{str(dtype).removeprefix('torch.')}-{quantize}": replace(served, dtype=dtype, quantize=quantize)
    for (name, served), (dtype, quantize) in product(NATIVE.items(), PRECISIONS)
}


def each(chosen: dict[str, Served], redundant: Collection[str] = ()) -> pytest.MarkDecorator:
    """Native layouts are skipped where there are no kernels; `redundant` names what is, whole or by its first words."""
    without = pytest.mark.skipif(not load().native, reason=f"no native kernels: {load().reason}")
    cases = []
    for name, served in chosen.items():
        marks = [without] if served.native else []
        if any(name == one or name.startswith(one + "-") for one in redundant):
            marks.append(LIKE_BOTH)
        cases.append(pytest.param(served, marks=marks, id=name))
    return pytest.mark.parametrize("served", cases)


def only(*names: str) -> pytest.MarkDecorator:
    return each({name: served for name, served in LAYOUTS.items() if name.removeprefix("native-") in names})


def check_storm(served: Served, seed: int, every: int = 1) -> None:
    """Of every so many requests, one is run alone, which takes most of the time; and the first of each rule."""
    crowd, requests = storm(served, seed, served.requests)
    first = {request.budget.rule: request for request in reversed(requests)}
    assert set(served.rules) <= first.keys(), "the seed leaves a rule out"
    chosen = {request.id: request for request in [*requests[::every], *first.values()]}
    for request in chosen.values():
        assert_as_alone(served, crowd, alone(served, request), request.id)
    assert not served.by_phase or len({request.budget.prefill for request in chosen.values()}) == 3
    assert crowd.ends.keys() == {request.id for request in requests}
    # The storm was one: else the equality above would say little.
    assert sum(stats.preemptions for stats in crowd.stats) > 2
    assert crowd.found > 0
    assert sum(stats.mixed for stats in crowd.stats) > 20
    assert crowd.chunks > 2
    assert Counter(crowd.ends.values())["abort"] >= 1
    assert crowd.engine.scheduler.blocks.used == 0


@each(LAYOUTS, ("topk",))  # in plain torch it has a storm with rules, and the circumstances below
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.redundant)])
def test_a_mixed_batch_gives_what_running_alone_gives(served: Served, seed: int) -> None:
    check_storm(served, seed)


@each(ROUNDED, SINGLE)
def test_so_it_does_with_weights_that_are_rounded(served: Served) -> None:
    check_storm(served, seed=2, every=3)


@each({name: replace(served, by_phase=True) for name, served in LAYOUTS.items() if not name.endswith("units")}, SINGLE)
def test_so_it_does_where_prompts_have_counts_of_their_own(served: Served) -> None:
    check_storm(served, seed=2, every=3)


@each({name: replace(LAYOUTS[name], rules=rules) for name, rules in RULED.items()})
def test_so_it_does_where_requests_have_rules_of_their_own(served: Served) -> None:
    check_storm(served, seed=5, every=3)


@each({f"{name}-{who}": replace(LAYOUTS[name], speculate=who) for who, name in GUESSED}, SINGLE)
def test_so_it_does_when_tokens_are_guessed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.speculation.MIN_PROBABILITY", 0.0)  # whatever it is worth
    crowd, requests = storm(served, seed=4, requests=served.requests)
    for request in requests[::3]:
        assert_as_alone(served, crowd, alone(served, request), request.id)
    drafted, accepted = (sum(getattr(stats, name) for stats in crowd.stats) for name in ("drafted", "accepted"))
    assert drafted > 10 and accepted < drafted
    assert accepted or served.length < 80, "a short random text hardly ever repeats itself"
    assert crowd.engine.scheduler.blocks.used == 0


@each(
    {f"{name}-{who}": replace(LAYOUTS[name], speculate=who) for who, name in [*PLAIN, *GUESSED]},
    (*SINGLE, "both-ngram"),
)
def test_every_position_keeps_the_counts_of_its_phase(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through chunks, preemption, drafts and prefixes found again: the logits are those of one pass over the text with
    the counts of every position side by side."""
    monkeypatch.setattr("engine.speculation.MIN_PROBABILITY", 0.0)
    layers = len(served.config.mixtures)
    counts = [((1,) * layers, (4,) * layers), ((5,) * layers, (1,) * layers), ((1, 6)[:layers], (3, 2)[:layers])]
    long = tuple(range(2 * served.block + 3))
    prompts = [(7,), (7, 8), (1, 2, 3) * 4, long, long]
    crowd = bench(served, blocks=served.few, step_tokens=7, running=5)
    requests = [
        Request(f"{n}-{m}", prompt, ExpertBudget(decode, prefill), Sampling(served.length // 2, seed=0, temperature=0))
        for m, (prefill, decode) in enumerate(counts)
        for n, prompt in enumerate(prompts)
    ]
    for request in requests:
        crowd.engine.add(request)
    crowd.finish()
    assert sum(stats.preemptions for stats in crowd.stats) and crowd.found
    for request in requests:
        ids = [*request.prompt, *crowd.tokens[request.id]]
        rows = [by_phase(request, position) for position in range(len(ids))]
        whole = PagedRun(served.model(), [ids], [torch.tensor(rows).T.contiguous()], served.block).step({0: len(ids)})
        for made in (crowd, alone(served, request)):  # alone, steps of one token follow upon each other
            for length, row_V in made.logits[request.id].items():
                served.assert_same(row_V, whole[0][length - 1])


def by_phase(request: Request, position: int) -> tuple[int, ...]:
    return request.budget.prefill if position < len(request.prompt) else request.budget.per_layer


@each(LAYOUTS)
def test_work_is_the_sum_of_the_counts(served: Served) -> None:
    crowd, _ = storm(served, seed=3, requests=10)
    assert [stats.routed_pairs for stats in crowd.stats if stats.routed_pairs] == crowd.computed
    assert sum(crowd.computed) > 0


@only("topk")
def test_the_saving_is_counted_against_the_trained_count(served: Served) -> None:
    single = alone(served, Request("a", (1, 2, 3, 4, 5), ExpertBudget((1, 1)), Sampling(max_tokens=3, seed=0)))
    computed = 5 + 2  # the third new token is returned and never computed
    assert sum(stats.routed_pairs for stats in single.stats) == computed * 2
    assert sum(stats.trained_pairs for stats in single.stats) == computed * 4
    assert all(2 <= stats.distinct_experts <= 12 for stats in single.stats)


@only("infinity", "infinity-units")
@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.redundant), 1.0])
def test_same_seed_same_answer_whatever_the_circumstances(served: Served, temperature: float) -> None:
    prompt = tuple(range(3 * served.block + 1))
    sampling = Sampling(max_tokens=20, seed=11, temperature=temperature)
    request = Request("a", prompt, ExpertBudget((3, 2)), sampling)
    expected = alone(served, request)
    others = [Request(str(n), prompt[:n], ExpertBudget((6, 1)), Sampling(25, seed=n, temperature=0)) for n in (2, 7, 9)]
    few = served.few
    for step_tokens, blocks, company in [(8, 40, []), (9, 40, others), (64, few, others), (8, few * 4 // 3, others)]:
        crowd = bench(served, blocks, step_tokens)
        for number in range(2):  # the second time the prefix is found
            again = Request(f"again{number}", request.prompt, request.budget, sampling)
            for other in company:
                crowd.engine.add(Request(f"{other.id}-{number}", other.prompt, other.budget, other.sampling))
            crowd.engine.add(again)
            crowd.finish()
            assert crowd.tokens[again.id] == expected.tokens["a"]
    different = alone(served, Request("a", prompt, request.budget, Sampling(20, seed=12, temperature=temperature)))
    row = len(prompt)
    assert (different.logits["a"][row] - expected.logits["a"][row]).abs().max() > 1e-3


def hits(served: Served, first: Request, second: Request) -> tuple[int, bool]:
    """How many prompt tokens the second finds of the first, and whether both then run on shared blocks."""
    made = bench(served)
    made.engine.add(first)
    made.step()
    made.engine.add(second)
    made.step()
    running = made.engine.scheduler._running
    shared = bool(set(running["a"].blocks) & set(running["b"].blocks))
    made.finish()
    return made.cached["b"], shared


def pair(
    served: Served, budgets: tuple[tuple[int, ...], tuple[int, ...]], seeds: tuple[int, int]
) -> tuple[Request, Request]:
    prompt = tuple(range(3 * served.block + 2))
    sampling = [Sampling(max_tokens=4, seed=seed, temperature=0) for seed in seeds]
    return (
        Request("a", prompt, ExpertBudget(budgets[0]), sampling[0]),
        Request("b", prompt, ExpertBudget(budgets[1]), sampling[1]),
    )


@each(LAYOUTS)
def test_same_prompt_and_budget_share_blocks(served: Served) -> None:
    assert hits(served, *pair(served, ((2, 3), (2, 3)), (5, 5))) == (3 * served.block, True)


@each(LAYOUTS)
@pytest.mark.parametrize("other", [(1, 3), (2, 4), (3, 2)])
def test_same_prompt_and_another_count_never_share(served: Served, other: tuple[int, ...]) -> None:
    assert hits(served, *pair(served, ((2, 3), other), (5, 5))) == (0, False)


@each(LAYOUTS)
def test_another_seed_shares_only_where_no_noise_is_drawn(served: Served) -> None:
    expected = (0, False) if served.config.draws_noise else (3 * served.block, True)
    assert hits(served, *pair(served, ((2, 3), (2, 3)), (5, 6))) == expected


@only("topk", "infinity")
def test_a_request_that_is_not_finite_fails_alone(served: Served) -> None:
    """Neither beside it nor later, on the blocks that it leaves behind, is anybody touched."""
    broken = decoder(served.config)
    broken.embed.weight[VOCABULARY - 1] = torch.nan
    model = served.prepared(broken)
    sampling = Sampling(max_tokens=12, seed=1, temperature=0, logit_bias=((VOCABULARY - 1, -100.0),))
    good, late, bad, early = (
        Request(id, prompt, ExpertBudget((2, 2)), sampling)
        for id, prompt in [
            ("good", (1, 2, 3)),
            ("late", tuple(range(9))),
            ("bad", (4, VOCABULARY - 1)),
            ("early", (VOCABULARY - 1, 4, 5)),
        ]
    )
    engine = bench(served, blocks=10, model=model).engine
    for request in (bad, early, good, late):
        engine.add(request)
    events = []
    while engine.has_work:
        events += engine.step().events
    assert {event.request_id: event.finish for event in events if event.finish} == {
        "bad": "error",
        "early": "error",
        "good": "length",
        "late": "length",
    }
    for request in (good, late):
        tokens = [event.token for event in events if event.request_id == request.id]
        assert tokens == alone(served, request, model).tokens[request.id]
