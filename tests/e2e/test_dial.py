"""The product's promise over real HTTP: on the bundled models more experts lose less and cost more, count by count.

The text was written for this test, so that no model has seen it. Speed is measured by `make bench-dial-http`.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.live import Live, serving
from weights.folder import compared_models

STORIES = (Path(__file__).parent / "stories.txt").read_text().strip().split("\n\n")
COUNTS = (1, 2, 4, 8)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=compared_models())
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    with serving("--model", request.param, "--threads", "1") as server:
        yield server


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
