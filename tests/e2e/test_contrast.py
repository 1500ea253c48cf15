"""Self-contrast decoding over real HTTP on a bundled model: in every API, with what else a request may ask for."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.live import Live, serving

CONTRAST = {"beta": 0.5, "alpha": 0.1, "weak_rank": 4}
PROMPT = "Lily saw a big red ball in the garden. She"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving("--model", "topk-stories", "--threads", "1") as server:
        yield server


def post(live: Live, path: str = "completions", **body: Any) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/{path}", json=body, timeout=60)


def complete(live: Live, contrast: Any = None, **body: Any) -> dict[str, Any]:
    experts = {} if contrast is None else {"experts": {"contrast": contrast}}
    fixed: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0.0}
    answer: dict[str, Any] = post(live, **fixed | experts | body).raise_for_status().json()
    return answer


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def test_beta_0_is_plain_decoding_and_another_answers_otherwise(live: Live) -> None:
    plain = complete(live)
    none = complete(live, {"beta": 0, "weak_rank": 32})
    assert texts(none) == texts(plain) and none["usage"].keys() == plain["usage"].keys()
    assert texts(complete(live, {"beta": 3.0, "alpha": 0.01, "weak_rank": 4})) != texts(plain)


def test_its_cost_is_in_usage_and_metrics(live: Live) -> None:
    layers = httpx.get(f"{live.url}/v1/models").json()["data"][0]["meta"]["moe"]["layers"]
    before = live.metric("contrast_tokens_total")
    usage = complete(live, CONTRAST, prompt=[9, 8, 7, 6], ignore_eos=True)["usage"]
    tokens = 4 + 23  # the last token is never computed
    assert usage["num_experts"] == 4
    assert usage["routed_pairs"] == tokens * layers * (4 + 1)
    assert usage["routed_pairs_trained"] == tokens * layers * 4
    assert usage["computed_rows"] == 2 * tokens
    assert live.metric("contrast_tokens_total") == before + tokens


def test_a_stream_has_the_same_text_seed_by_seed(live: Live) -> None:
    asked: dict[str, Any] = {"n": 2, "seed": 3, "temperature": 0.9, "logprobs": 2, "presence_penalty": 0.5}
    whole = complete(live, CONTRAST, **asked)
    assert len(set(texts(whole))) == 2
    values = [value for choice in whole["choices"] for value in choice["logprobs"]["token_logprobs"]]
    assert all(-20 < value <= 0 for value in values), "of tokens that are not left out"
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 24, "stream": True, "experts": {"contrast": CONTRAST}}
    streamed = ["", ""]
    for line in post(live, **body | asked).text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                streamed[choice["index"]] += choice["text"]
    assert streamed == texts(whole)
    stop = texts(whole)[0][5:9]
    assert texts(complete(live, CONTRAST, **asked | {"stop": stop}))[0] == texts(whole)[0].split(stop)[0]


def test_chats_responses_and_structured_output_take_it(live: Live) -> None:
    fixed: dict[str, Any] = {"experts": {"contrast": CONTRAST, "count": 2}, "temperature": 0.0}
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    chat = {"messages": [{"role": "user", "content": "Who is it?"}], "max_tokens": 60, "response_format": schema}
    answer = post(live, "chat/completions", **fixed | chat).raise_for_status().json()
    found = json.loads(answer["choices"][0]["message"]["content"])
    assert set(found) == {"name", "age"} and answer["usage"]["num_experts"] == 2
    told = post(live, "responses", **fixed, input="Tell a story.", max_output_tokens=9).raise_for_status().json()
    assert told["usage"]["output_tokens"] == 9 or told["status"] == "completed"


@pytest.mark.parametrize(
    ("contrast", "param", "said"),
    [
        (True, "experts.contrast", "an object such as"),
        ({"beta": 11}, "experts.contrast.beta", "between 0 and 10, got 11"),
        ({"alpha": 0}, "experts.contrast.alpha", "above 0 and at most 1, got 0"),
        ({"weak_rank": 33, "beta": 0}, "experts.contrast.weak_rank", "between 1 and 32 for this model, got 33"),
        ({"rank": 2}, "experts.contrast.rank", "did you mean experts.contrast.weak_rank?"),
    ],
)
def test_faults_are_named(live: Live, contrast: Any, param: str, said: str) -> None:
    error = post(live, prompt="a", experts={"contrast": contrast})
    assert error.status_code == 400 and error.json()["error"]["param"] == param
    assert said in error.json()["error"]["message"]
