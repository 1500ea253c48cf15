"""Closed objects: what a schema does not name is ruled out wherever the schema is silent, and nothing else is."""

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from server.dialects.closed_schemas import SchemaTooComplex, closed
from server.requests.structured import json_rule

BUNDLED = Path("weights/bundled/infinity-stories/tokenizer.json")
INT: dict[str, Any] = {"type": "integer"}
TEXT: dict[str, Any] = {"type": "string"}


@cache
def tokenizer() -> tuple[Tokenizer, LLTokenizer]:
    made = Tokenizer.from_file(str(BUNDLED))
    return made, LLTokenizer(made.to_str(), n_vocab=made.get_vocab_size(), eos_token=0)


def allows(schema: dict[str, Any], answer: Any) -> bool:
    """Whether the library takes the answer, as it is written on one line."""
    backend, tokens = tokenizer()
    grammar = LLMatcher.grammar_from_lark(f"start: {json_rule(schema)}")
    matcher = LLMatcher(tokens, grammar, log_level=0)
    assert not matcher.get_error(), matcher.get_error()
    ids = backend.encode(json.dumps(answer), add_special_tokens=False).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


A = {"properties": {"a": INT}, "required": ["a"]}
B = {"properties": {"b": INT}, "required": ["b"]}
BASE = {"$defs": {"base": {"type": "object", **A}}}
CASES: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "flat": ({"type": "object", **A}, [{"a": 1}], [{"a": 1, "b": 1}, {}]),
    "no properties": ({"type": "object"}, [{}, {"x": [1]}], [1]),
    "empty properties": ({"type": "object", "properties": {}}, [{}], [{"x": 1}]),
    "open": ({**A, "additionalProperties": True}, [{"a": 1, "b": "x"}], [{"b": 1}]),
    "a map": ({"additionalProperties": TEXT, "type": "object"}, [{"a": "x"}], [{"a": 1}]),
    "patterns": ({"type": "object", "patternProperties": {"^x": INT}}, [{"xa": 1}, {}], [{"ya": 1}]),
    "nested": ({**A, "properties": {"a": {"type": "object", **B}}}, [{"a": {"b": 1}}], [{"a": {"b": 1, "c": 1}}]),
    "items": ({"type": "array", "items": {"type": "object", **A}}, [[{"a": 1}], []], [[{"a": 1, "b": 1}]]),
    "tuple": ({"type": "array", "prefixItems": [A], "items": False}, [[{"a": 1}]], [[{"a": 1, "b": 1}]]),
    "within a map": ({"type": "object", "additionalProperties": A}, [{"x": {"a": 1}}], [{"x": {"a": 1, "b": 1}}]),
    "a reference": ({**BASE, "$ref": "#/$defs/base"}, [{"a": 1}], [{"a": 1, "b": 1}]),
    "a wrapped reference": (
        {**BASE, "allOf": [{"$ref": "#/$defs/base"}], "title": "t"},
        [{"a": 1}],
        [{"a": 1, "b": 1}],
    ),
    "alternatives": (
        {"anyOf": [{"type": "object", **A}, {"type": "object", **B}, {"type": "null"}]},
        [{"a": 1}, {"b": 1}, None],
        [{"a": 1, "b": 1}],
    ),
    "one of": ({"oneOf": [{"type": "object", **A}, {"type": "object", **B}]}, [{"a": 1}, {"b": 1}], [{"a": 1, "c": 1}]),
    "all of": ({"type": "object", "allOf": [A, B]}, [{"a": 1, "b": 1}], [{"a": 1}, {"a": 1, "b": 1, "c": 1}]),
    "inherited": (
        {**BASE, "allOf": [{"$ref": "#/$defs/base"}, {"type": "object", **B}]},
        [{"a": 1, "b": 1}],
        [{"a": 1}, {"b": 1}, {"a": 1, "b": 1, "c": 1}],
    ),
    "beside a reference": (
        {**BASE, "$ref": "#/$defs/base", **B},
        [{"a": 1, "b": 1}],
        [{"b": 1}, {"a": 1, "b": 1, "c": 1}],
    ),
    "a base by itself, too": (
        {
            **BASE,
            "type": "object",
            "required": ["x", "y"],
            "properties": {
                "x": {"allOf": [{"$ref": "#/$defs/base"}, {"type": "object", **B}]},
                "y": {"$ref": "#/$defs/base"},
            },
        },
        [{"x": {"a": 1, "b": 1}, "y": {"a": 1}}],
        [{"x": {"a": 1, "b": 1}, "y": {"a": 1, "b": 1}}, {"x": {"a": 1, "b": 1, "c": 1}, "y": {"a": 1}}],
    ),
    "beside alternatives": (
        {"type": "object", "properties": {"k": INT}, "required": ["k"], "anyOf": [A, B]},
        [{"k": 1, "a": 1}, {"k": 1, "b": 1}],
        [{"k": 1}, {"k": 1, "a": 1, "c": 1}],
    ),
    "an open part": (
        {"type": "object", "allOf": [A, {**B, "additionalProperties": True}]},
        [{"a": 1, "b": 1, "c": 1}],
        [{"a": 1}],
    ),
    "required without a schema": (
        {"type": "object", "properties": {"a": INT}, "required": ["a", "z"]},
        [{"a": 1, "z": "x"}],
        [{"a": 1}, {"a": 1, "z": 1, "y": 1}],
    ),
    "recursive": (
        {
            "$defs": {
                "n": {"type": "object", "properties": {"v": INT, "next": {"$ref": "#/$defs/n"}}, "required": ["v"]}
            },
            "$ref": "#/$defs/n",
        },
        [{"v": 1, "next": {"v": 2}}],
        [{"v": 1, "next": {"v": 2, "w": 3}}],
    ),
    "a recursive base": (
        {
            "$defs": {
                "n": {"type": "object", "properties": {"v": INT, "next": {"$ref": "#/$defs/n"}}, "required": ["v"]},
                "m": {"allOf": [{"$ref": "#/$defs/n"}, {"type": "object", **B}]},
            },
            "$ref": "#/$defs/m",
        },
        [{"v": 1, "next": {"v": 2}, "b": 1}],
        [{"v": 1, "next": {"v": 2, "b": 1}, "b": 1}, {"v": 1, "b": 1, "c": 1}],
    ),
    "the root": (
        {"type": "object", "properties": {"v": INT, "next": {"$ref": "#"}}},
        [{"v": 1, "next": {"v": 2}}],
        [{"v": 1, "next": {"w": 2}}],
    ),
    "data that looks like a schema": ({"enum": [{"properties": {"a": 1}}]}, [{"properties": {"a": 1}}], [{}]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_closed_schema_allows(name: str) -> None:
    schema, right, wrong = CASES[name]
    before = json.dumps(schema)
    made = closed(schema)
    assert [answer for answer in right if not allows(made, answer)] == []
    assert [answer for answer in wrong if allows(made, answer)] == []
    assert json.dumps(schema) == before, "the caller's own is left as it is"
    validator = jsonschema.Draft202012Validator(made)
    assert all(map(validator.is_valid, right)) and not any(map(validator.is_valid, wrong))
    assert closed(made) == made


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.dictionaries(st.sampled_from("abc"), leaves, max_size=2)
    return st.one_of(
        st.builds(lambda props: {"type": "object", "properties": props}, names),
        st.builds(lambda props: {"properties": props, "$ref": "#/$defs/d"}, names),
        st.builds(
            lambda key, both: {key: both}, st.sampled_from(["allOf", "anyOf"]), st.lists(leaves, min_size=1, max_size=2)
        ),
        st.builds(
            lambda props, both: {"properties": props, "anyOf": both}, names, st.lists(leaves, min_size=1, max_size=2)
        ),
        st.builds(lambda item: {"type": "array", "items": item}, leaves),
        st.builds(lambda more: {"type": "object", "additionalProperties": more}, leaves),
    )


SCHEMAS = st.recursive(
    st.sampled_from([INT, TEXT, True, {}, {"$ref": "#/$defs/d"}, {"type": "object"}]), nested, max_leaves=6
)
VALUES = st.recursive(
    st.sampled_from([1, "x"]),
    lambda inner: st.one_of(st.dictionaries(st.sampled_from("abcx"), inner, max_size=3), st.lists(inner, max_size=2)),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(schema=SCHEMAS, shared=SCHEMAS, value=VALUES)
def test_closing_only_rules_out(schema: Any, shared: Any, value: Any) -> None:
    """What is valid stays so without its names that no schema knows; what is invalid never becomes valid."""
    whole = {"allOf": [schema], "$defs": {"d": {"type": "object", "properties": {"d": shared}}}}
    made = jsonschema.Draft202012Validator(closed(whole))
    if made.is_valid(value):
        assert jsonschema.Draft202012Validator(whole).is_valid(value)


def chain(length: int) -> dict[str, Any]:
    defs = {f"d{i}": {"properties": {f"p{i}": INT}, "allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(length)}
    return {"$defs": defs | {f"d{length}": A}, "$ref": "#/$defs/d0"}


WIDE = {"allOf": [{"properties": {f"p{i}": True}} for i in range(1000)]}


@pytest.mark.parametrize(
    "schema",
    [chain(1000), {"items": [WIDE] * 30}, {"allOf": [{"$ref": "#/allOf/0"}, {"$ref": "#" + "/a" * 9_000}] * 900}],
    ids=["chain", "wide", "loops"],
)
def test_entangled_schemas_cost_little(schema: dict[str, Any]) -> None:
    begun = time.process_time()
    try:
        closed(schema)
    except SchemaTooComplex as error:
        assert "at most" in str(error)
    assert time.process_time() - begun < 1


def test_loops_and_lost_references_end() -> None:
    for schema in (
        {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, A]}}, "$ref": "#/$defs/a"},
        {"$ref": "#", **A},
        {"$ref": "#/$defs/none", **A},
        {"$ref": "https://example.com", **A},
        {"$ref": "#/allOf/99999999999", "allOf": [A, B]},
        {"$ref": 5, "properties": 5, "allOf": 5, "required": 5, "items": 5, "$defs": 5},
    ):
        assert closed(schema)
