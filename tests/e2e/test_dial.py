"""What more experts change over real HTTP, on each bundled model: they lose less and cost more, count by count; and
`return_routed_experts` tells which ones ran, as shapes, counts and sets say.

The text was written for this test, so that no model has seen it. Speed is measured by `make bench-dial-http`.
"""

import base64
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.e2e.live import Live, serving
from weights.folder import compared_models

# Each test has counts of its own, so that no prompt comes out of the prefix cache unless it should.
PROMPT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the"
OUTPUT, LAYERS, GROUPS_PER_DRAW = 6, 6, 3
STORIES = (Path(__file__).parent / "stories.txt").read_text().strip().split("\n\n")
COUNTS = (1, 2, 4, 8)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=compared_models())
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    with serving("--model", request.param, "--threads", "1", "--return-routed-experts") as server:
        yield server


def complete(live: Live, **body: Any) -> dict[str, Any]:
    values = {"prompt": PROMPT, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True} | body
    values["return_routed_experts"] = True
    answer: dict[str, Any] = httpx.post(f"{live.url}/v1/completions", json=values, timeout=60).raise_for_status().json()
    return answer


def routes_of(answer: dict[str, Any]) -> list[list[set[int]]]:
    """By token and layer the experts, or the kept groups."""
    found = answer["choices"][0]["routed_experts"]
    kind: Any = np.dtype("<u2") if found["dtype"] == "uint16" else np.uint8
    array: NDArray[Any] = np.frombuffer(base64.b64decode(found["data"]), kind).reshape(found["shape"])
    if found["bits"]:
        array = np.unpackbits(array, axis=2, bitorder="little")
        return [[set(np.flatnonzero(row).tolist()) for row in token] for token in array]
    none = np.iinfo(kind).max
    return [[set(row[row != none].tolist()) for row in token] for token in array]


def test_each_token_has_as_many_as_it_asked_for_and_they_are_nested(live: Live) -> None:
    answers = {count: complete(live, num_experts=count) for count in (1, 2, 8)}
    infinity = answers[1]["choices"][0]["routed_experts"]["bits"]
    for count, answer in answers.items():
        routes, usage = routes_of(answer), answer["usage"]
        assert len(routes) == usage["prompt_tokens"] + OUTPUT - 1, "the last token is never computed"
        size = count * (GROUPS_PER_DRAW if infinity else 1)
        assert {len(layer) for token in routes for layer in token} == {size}
        assert usage["routed_pairs"] == len(routes) * LAYERS * count
    first = {count: [token[0] for token in routes_of(answer)[:8]] for count, answer in answers.items()}
    assert all(less <= more for less, more in zip(first[1], first[2], strict=True)), "before layer 1 nothing differs"
    assert all(less <= more for less, more in zip(first[2], first[8], strict=True))
    assert len({frozenset(experts) for experts in first[1]}) > 1, "tokens differ"


def test_counts_by_layer_and_phase_are_what_ran(live: Live) -> None:
    counts = [1, 2, 3, 4, 5, 6]
    answer = complete(live, prompt=f"{PROMPT} garden", experts={"prefill": 7, "decode": counts})
    found, prompt = answer["choices"][0]["routed_experts"], answer["usage"]["prompt_tokens"]
    factor = GROUPS_PER_DRAW if found["bits"] else 1
    sizes = [[len(layer) // factor for layer in token] for token in routes_of(answer)]
    assert sizes[:prompt] == [[7] * LAYERS] * prompt and sizes[prompt:] == [counts] * (OUTPUT - 1)


def test_a_prompt_out_of_the_prefix_cache_has_none_and_the_rest_is_the_same(live: Live) -> None:
    body = {"prompt": f"{PROMPT} big garden with her dog Max.", "num_experts": 3}
    whole, again = complete(live, **body), complete(live, **body)
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    found = again["choices"][0]["routed_experts"]
    assert cached >= 16 and found["first"] == cached and whole["choices"][0]["routed_experts"]["first"] == 0
    assert routes_of(again) == routes_of(whole)[cached:]


def test_a_stream_says_the_same_in_its_last_chunk(live: Live) -> None:
    body: dict[str, Any] = {"prompt": f"{PROMPT} old house with an old tree.", "num_experts": 5, "temperature": 0}
    whole = complete(live, **body)
    body |= {"max_tokens": OUTPUT, "ignore_eos": True, "return_routed_experts": True, "stream": True}
    lines = httpx.post(f"{live.url}/v1/completions", json=body, timeout=60).text.splitlines()
    (line,) = [line for line in lines if '"routed_experts"' in line]
    chunk = json.loads(line.removeprefix("data: "))
    assert chunk["choices"][0]["finish_reason"] == "length"
    assert routes_of(chunk) == routes_of(whole)[chunk["choices"][0]["routed_experts"]["first"] :]


def scored(live: Live, count: int) -> dict[str, Any]:
    """The stories, scored and not continued."""
    body = {"prompt": STORIES, "max_tokens": 0, "echo": True, "logprobs": 0, "num_experts": count}
    answer: dict[str, Any] = httpx.post(f"{live.url}/v1/completions", json=body, timeout=120).raise_for_status().json()
    return answer


def loss(answer: dict[str, Any]) -> float:
    """Nats per token, without the first of each story."""
    values = [value for choice in answer["choices"] for value in choice["logprobs"]["token_logprobs"][1:]]
    return -float(sum(values)) / len(values)


def test_more_experts_lose_less_and_work_more(live: Live) -> None:
    layers = httpx.get(f"{live.url}/v1/models").json()["data"][0]["meta"]["moe"]["layers"]
    answers = {count: scored(live, count) for count in COUNTS}
    losses = {count: loss(answer) for count, answer in answers.items()}
    assert all(losses[more] < losses[fewer] - 0.002 for fewer, more in pairwise(COUNTS)), losses
    for count, answer in answers.items():
        usage = answer["usage"]
        assert usage["routed_pairs"] == usage["prompt_tokens"] * layers * count
        assert usage["routed_pairs_trained"] == usage["prompt_tokens"] * layers * 4
        assert answer["metrics"]["routed_pairs"] == usage["routed_pairs"]
