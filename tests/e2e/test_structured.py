"""Structured output, log-probabilities and speculation on the bundled model over real HTTP, at every expert count."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from tests.e2e.live import Live, serving
from weights.folder import DEFAULT

pytestmark = pytest.mark.slow
COUNTS = (1, 2, 4, 8)
WORD = {"type": "string", "maxLength": 10}
SCHEMAS: dict[str, dict[str, Any]] = {
    "a person": {
        "type": "object",
        "properties": {
            "name": WORD,
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "married": {"type": "boolean"},
        },
        "required": ["name", "age", "married"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "order": {
                "type": "object",
                "properties": {
                    "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
                    "lines": {
                        "type": "array",
                        "minItems": 1,
                        "maxItems": 2,
                        "items": {
                            "type": "object",
                            "properties": {
                                "sku": {"enum": ["a1", "b2"]},
                                "count": {"type": "integer", "maximum": 9, "minimum": 1},
                            },
                            "required": ["sku", "count"],
                            "additionalProperties": False,
                        },
                    },
                },
                "required": ["id", "lines"],
                "additionalProperties": False,
            }
        },
        "required": ["order"],
        "additionalProperties": False,
    },
    "formats": {
        "type": "object",
        "properties": {
            "day": {"type": "string", "format": "date"},
            "id": {"type": "string", "format": "uuid"},
            "host": {"type": "string", "format": "ipv4"},
        },
        "required": ["day", "id", "host"],
        "additionalProperties": False,
    },
    "recursion": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "alternatives": {
        "oneOf": [{"const": None}, {"type": "integer", "minimum": 100, "maximum": 999}, {"enum": ["yes", "no"]}]
    },
    "a list": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 3, "maxItems": 6},
    "a map": {
        "type": "object",
        "properties": {"total": {"type": "integer", "minimum": 1, "maximum": 99}},
        "required": ["total"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 3,
    },
}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving("--threads", "1", "--max-logprobs", "20", "--speculate", "ngram") as server:
        yield server


def post(live: Live, path: str, **body: Any) -> Any:
    response = httpx.post(f"{live.url}{path}", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


# A map may grow to the limit of tokens: by far the slowest, and the same grammar as an object.
schemas = [pytest.param(name, marks=pytest.mark.redundant if name == "a map" else ()) for name in SCHEMAS]


@pytest.mark.parametrize("name", schemas)
def test_an_answer_satisfies_its_schema_at_every_count(live: Live, name: str) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[name], "strict": True}}
    # RFC 3339 has a year 0000, and Python's calendar has not: days are only held to their form
    formats = jsonschema.FormatChecker(formats=["uuid", "ipv4"])
    checker = jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=formats)
    for count in COUNTS:
        for temperature in (0, 1):
            body = {"messages": [{"role": "user", "content": "Write."}], "temperature": temperature, "seed": count}
            answer = post(
                live, "/v1/chat/completions", **body, num_experts=count, response_format=wanted, max_tokens=450
            )
            assert answer["usage"]["num_experts"] == count
            (choice,) = answer["choices"]
            if choice["finish_reason"] == "length":  # open-ended schemas may go on for ever, and then it is said
                assert name in ("recursion", "a map")
                continue
            found = json.loads(choice["message"]["content"])
            checker.validate(found)
            assert name != "formats" or re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-([0-2]\d|3[01])", found["day"])


@pytest.mark.parametrize("count", COUNTS)
def test_a_regex_and_a_choice_hold(live: Live, count: int) -> None:
    for seed in range(3):
        body = {"prompt": "Lily said", "seed": seed, "num_experts": count, "max_tokens": 40}
        text = post(live, "/v1/completions", **body, guided_regex=r"[a-z]{2,8} [0-9]{2}!")["choices"][0]["text"]
        assert re.fullmatch(r"[a-z]{2,8} [0-9]{2}!", text)
        chosen = post(live, "/v1/completions", **body, guided_choice=["cat", "dog"])["choices"][0]
        assert (chosen["text"], chosen["finish_reason"]) in (("cat", "stop"), ("dog", "stop"))


@pytest.mark.parametrize("count", [1, 4])
def test_what_was_said_scores_as_it_was_said(live: Live, count: int) -> None:
    tokens = post(live, "/tokenize", prompt="Once upon a time")["tokens"]
    body = {"model": f"{DEFAULT}@k{count}", "seed": 3, "logprobs": 2, "temperature": 1}
    said = post(live, "/v1/completions", prompt=tokens, max_tokens=40, ignore_eos=True, **body)["choices"][0][
        "logprobs"
    ]
    answer = post(live, "/tokenize", prompt="".join(said["tokens"]), add_special_tokens=False)["tokens"]
    if len(answer) != len(said["tokens"]):
        pytest.skip("the text does not tokenise as it was drawn")
    whole = post(live, "/v1/completions", prompt=tokens + answer, max_tokens=0, echo=True, **body)["choices"][0][
        "logprobs"
    ]
    assert whole["token_logprobs"][len(tokens) :] == pytest.approx(said["token_logprobs"], abs=1e-4)
    assert whole["tokens"][len(tokens) :] == said["tokens"]


def test_many_prompts_are_scored_at_once(live: Live) -> None:
    prompts = [[0, 5, 6, 7], [0, 9], [0, 11, 12, 13, 14, 15]]
    body = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "model": f"{DEFAULT}@k2", "seed": 1}
    together = post(live, "/v1/completions", prompt=prompts, **body)["choices"]
    for prompt, choice in zip(prompts, together, strict=True):
        alone = post(live, "/v1/completions", prompt=[prompt], **body)["choices"][0]
        assert choice["logprobs"] == alone["logprobs"] and len(alone["logprobs"]["tokens"]) == len(prompt) + 1
        for value, top in zip(
            alone["logprobs"]["token_logprobs"][1:], alone["logprobs"]["top_logprobs"][1:], strict=True
        ):
            assert max(top.values()) >= value and value in top.values()


def test_several_answers_read_their_prompt_once(live: Live) -> None:
    prompt = [0, *range(100, 260)]
    before = live.metric("prefix_cache_hits_total")
    answer = post(live, "/v1/completions", prompt=prompt, n=4, max_tokens=5, seed=77, temperature=1)
    assert len({choice["text"] for choice in answer["choices"]}) > 1
    assert live.metric("prefix_cache_hits_total") - before == 3 * (len(prompt) // 16 * 16)


def test_cached_tokens_are_told_however_an_answer_ends(live: Live) -> None:
    body = {"prompt": [0, *range(300, 380)], "max_tokens": 30, "temperature": 0, "seed": 1}
    post(live, "/v1/completions", **body)
    for more in ({}, {"stop": ["a", "e", " "]}):
        usage = post(live, "/v1/completions", **body | more)["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 80


@pytest.mark.redundant  # tests/engine/test_mixed_batch.py and test_speculation.py compare and count, in one process
def test_drafts_are_counted_and_change_nothing(live: Live) -> None:
    body = {"prompt": "The cat. The dog. The cat. The dog. The cat.", "max_tokens": 60, "seed": 5, "ignore_eos": True}
    body |= {"guided_regex": "( The (cat|dog)\\.){5} The end of this story is near", "ignore_eos": False}
    guessed = post(live, "/v1/completions", **body)["choices"][0]["text"]
    assert live.metric("spec_decode_num_accepted_tokens_total") > 0
    assert live.metric("spec_decode_num_draft_tokens_total") >= live.metric("spec_decode_num_accepted_tokens_total")
    with serving("--threads", "1", "--speculate", "off") as plain:
        assert post(plain, "/v1/completions", **body)["choices"][0]["text"] == guessed
        assert plain.metric("spec_decode_num_draft_tokens_total") == 0


def test_a_bad_grammar_leaves_others_untouched(live: Live) -> None:
    response = httpx.post(f"{live.url}/v1/completions", json={"prompt": "a", "guided_regex": "(?=a)"}, timeout=30)
    assert response.status_code == 400 and response.json()["error"]["param"] == "guided_regex"
    done = post(live, "/v1/completions", prompt="a", guided_choice=["cat"], ignore_eos=True, max_tokens=12)["choices"][
        0
    ]
    assert (done["text"], done["finish_reason"]) == ("cat", "stop"), "the end of a grammar wins over ignore_eos"
    cut = post(live, "/v1/completions", prompt="a", guided_regex="[ab]{100}", max_tokens=3)["choices"][0]
    assert cut["finish_reason"] == "length"
