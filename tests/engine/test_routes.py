"""Routes of a request: what a plain forward of its tokens chooses, whatever the engine did on the way there."""

from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

from engine.routes import RouteRecord, pack
from engine.types import MAX_ROUTED_TOKENS, Request, Routes, Sampling, TokenEvent
from model.backends.cpu.kernels.library import load
from model.backends.torch.attend import WholeAttend
from model.budget import ExpertBudget, RoutingRule
from model.decoder import Decoder
from model.errors import InvalidRequest
from model.shapes.feed_forward import FeedForward
from model.step import Observer
from tests.engine.random_workload import Bench, Served, bench
from tests.model.tiny import VOCABULARY, decoder, infinity, llama_like, topk, whole_batch

TOPK = Served(llama_like(topk(normalise=True), topk(), qk_norm="full"), block=4, few=16, requests=1)
DRAWS = Served(llama_like(infinity(block=4), infinity(block=4)), block=4, few=16, requests=1)


def native(*layers: FeedForward) -> Served:
    return Served(llama_like(*layers, context=80, head_width=16), block=16, few=5, requests=1, native=True)


DRAW = infinity(block=16, draws="points")
NATIVE = {"topk": native(topk(normalise=True), topk()), "infinity": native(DRAW, DRAW)}
without_kernels = pytest.mark.skipif(not load().native, reason=f"no native kernels: {load().reason}")
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)
COUNTS = (2, 4)


def asked(id: str, counts: tuple[int, ...] = COUNTS, tokens: int = 14, **changes: object) -> Request:
    sampling = Sampling(max_tokens=tokens, seed=1, temperature=0.0)
    request = Request(id, PROMPT, ExpertBudget(counts), sampling, return_routes=True)
    return replace(request, **changes)  # type: ignore[arg-type]


def ended(crowd: Bench, *requests: Request) -> dict[str, tuple[list[int], TokenEvent]]:
    """The answer and the last event of requests that run together."""
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    last: dict[str, TokenEvent] = {}
    for request in requests:
        crowd.engine.add(request)
    while crowd.engine.has_work:
        for event in crowd.engine.step().events:
            assert event.error is None and (event.routes is None or event.finish)
            tokens[event.request_id] += [] if event.token is None else [event.token]
            last[event.request_id] = event
    return {id: (tokens[id], last[id]) for id in tokens}


class Seen(Observer):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.expert_LTK: list[Tensor] = []

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        pass

    def routes(self, layer: int, expert_TK: Tensor) -> None:
        assert layer == len(self.expert_LTK)
        self.expert_LTK.append(expert_TK)


def plain(model: Decoder, ids: list[int], counts: tuple[int, ...], seed: int = 1) -> list[list[list[int]]]:
    """Per token and layer, the experts of one forward of all tokens."""
    seen = Seen()
    batch = replace(whole_batch(ids, counts, seed), routes=True)
    model(batch, WholeAttend(len(ids)), seen)
    rows = zip(*(expert_TK.tolist() for expert_TK in seen.expert_LTK), strict=True)
    return [[[expert for expert in row if expert >= 0] for row in token] for token in rows]


def read(routes: Routes) -> list[list[list[int]]]:
    """The same of what is sent."""
    tokens, layers, width = routes.shape
    array_TLW = np.frombuffer(routes.data, dtype=np.dtype(routes.dtype).newbyteorder("<")).reshape(
        tokens, layers, width
    )
    if routes.bits:
        bits_TLE = np.unpackbits(array_TLW, axis=2, bitorder="little")
        return [[row.nonzero()[0].tolist() for row in token] for token in bits_TLE]
    nothing = np.iinfo(array_TLW.dtype).max
    return [[[int(e) for e in row if e != nothing] for row in token] for token in array_TLW]


def check(served: Served, crowd: Bench, request: Request, answer: list[int], last: TokenEvent) -> Routes:
    """That a request's routes are those of a plain forward, from the first token that it computed on."""
    routes = last.routes
    assert routes is not None and last.stats is not None
    ids = [*request.prompt, *answer][:-1]
    assert routes.first == last.stats.cached_tokens and routes.shape[0] == len(ids) - routes.first
    model = decoder(served.config)
    assert read(routes) == plain(model, ids, request.budget.per_layer)[routes.first :]
    return routes


@pytest.mark.parametrize("served", [TOPK, DRAWS], ids=["topk", "infinity"])
@pytest.mark.parametrize("speculate", ["off", "ngram", "experts=1"])
def test_routes_are_those_of_a_plain_forward(served: Served, speculate: str) -> None:
    """Beside others with more experts, in chunks, with drafts."""
    crowd = bench(replace(served, speculate=speculate), step_tokens=7, running=4)
    others = [asked("more", (6, 6)), asked("none", (5, 1), return_routes=False)]
    found = ended(crowd, asked("a"), *others)
    routes = check(served, crowd, asked("a"), *found["a"])
    check(served, crowd, others[0], *found["more"])
    assert found["none"][1].routes is None
    assert routes.bits == (served is DRAWS) and routes.dtype == "uint8"
    assert routes.shape[1:] == (2, -(-12 // 8) if served is DRAWS else max(COUNTS))


@without_kernels
@pytest.mark.parametrize("name", NATIVE)
def test_native_kernels_tell_the_routes_of_plain_torch(name: str) -> None:
    served = NATIVE[name]
    crowd = bench(served, step_tokens=9)
    found = ended(crowd, asked("a"), asked("more", (6, 6)))
    check(served, crowd, asked("a"), *found["a"])


def test_tokens_of_the_prefix_cache_have_none() -> None:
    crowd = bench(TOPK)
    ended(crowd, asked("first"))
    found = ended(crowd, asked("again"))
    assert check(TOPK, crowd, asked("again"), *found["again"]).first == 8


def test_what_is_computed_again_is_told_once() -> None:
    crowd = bench(TOPK, blocks=16, step_tokens=9, cache=False)
    requests = [asked(str(id), tokens=40, salt=str(id), prompt=(id + 1, *PROMPT)) for id in range(4)]
    found = ended(crowd, *requests)
    preemptions = [last.stats.preemptions for _, last in found.values() if last.stats]
    assert sum(preemptions) > 0
    for request in requests:
        check(TOPK, crowd, request, *found[request.id])


def test_a_scored_prompt_has_routes_to_its_end() -> None:
    scoring = Sampling(max_tokens=0, seed=1, temperature=0.0, prompt_logprobs=0)
    ((answer, last),) = ended(bench(TOPK), asked("a", sampling=scoring)).values()
    assert answer == [] and last.routes is not None and last.routes.shape[0] == len(PROMPT)


def test_as_many_as_the_pairs_that_ran() -> None:
    rule = RoutingRule(threshold=0.6, reuse=1)
    found = ended(bench(TOPK, cache=False), *(asked(str(i), budget=ExpertBudget((4, 4), rule=rule)) for i in range(3)))
    for _, last in found.values():
        assert last.routes is not None and last.stats is not None
        assert sum(len(row) for token in read(last.routes) for row in token) == last.stats.routed_pairs


def test_an_aborted_request_has_none() -> None:
    crowd = bench(TOPK)
    crowd.engine.add(asked("a"))
    crowd.engine.step()
    crowd.engine.abort("a")
    assert [(event.finish, event.routes) for event in crowd.engine.step().events] == [("abort", None)]


def test_too_many_tokens_are_refused() -> None:
    long = tuple(i % VOCABULARY for i in range(MAX_ROUTED_TOKENS))
    served = replace(TOPK, config=llama_like(topk(), context=2 * MAX_ROUTED_TOKENS))
    crowd = bench(served, blocks=1024)
    with pytest.raises(InvalidRequest, match="at most 2048 tokens, but you requested 2049") as error:
        crowd.engine.add(asked("a", (1,), 1, prompt=long))
    assert error.value.param == "return_routed_experts"
    crowd.engine.add(asked("a", (1,), 1, prompt=long[1:]))


def packed(shape: FeedForward, rows: list[list[int]]) -> Routes:
    record = RouteRecord()
    record.put(0, pack([np.array(rows, np.int32)], [shape]))
    routes = record.routes(0, len(rows))
    assert routes is not None
    return routes


@pytest.mark.parametrize(("experts", "dtype"), [(255, "uint8"), (256, "uint16"), (300, "uint16")])
def test_the_type_has_room_for_every_expert_and_for_none(experts: int, dtype: str) -> None:
    routes = packed(topk(experts=experts), [[experts - 1, 0], [3, -1]])
    assert (routes.dtype, routes.shape) == (dtype, (2, 1, 2))
    assert read(routes) == [[[experts - 1, 0]], [[3]]]


def record_of(*parts: tuple[int, list[list[int]]]) -> RouteRecord:
    record = RouteRecord()
    for start, rows in parts:
        record.put(start, pack([np.array(rows, np.int32)], [topk()]))
    return record


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (record_of((0, [[1], [2]]), (2, [[3, 4]])), [[1], [2], [3, 4]]),
        (record_of((0, [[1, 2], [3, 4]]), (1, [[5]])), [[1, 2], [5]]),
        (record_of((0, [[1, 2, 0], [3, 4, 5]]), (0, [[2, -1], [3, -1]])), [[2], [3]]),
    ],
)
def test_later_routes_replace_earlier_ones(record: RouteRecord, expected: list[list[int]]) -> None:
    routes = record.routes(0, len(expected))
    assert routes is not None and read(routes) == [[row] for row in expected]
    assert routes.shape[2] == max(map(len, expected))
