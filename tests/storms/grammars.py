"""A storm of grammars and schemas: slow to compile, expensive at every token, or without an end.

`python -m tests.storms.grammars [WAVE …]`
"""

import sys
from typing import Any

from tests.storms.base import ANSWERED, CHAT, COMPLETIONS, FAILED, REFUSED, Storm, Wave, main

DEAR = "start: s\ns: s s | s s s | /[a-z ]/ | /[a-z]+/ | /[a-e ]+/\n"
ONCE: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 32, "temperature": 1}
PATTERNS = ("(a|a)*b", "(a+)+$", "(.*.*.*.*)*x", "[a-z]{1,5000}", "((a?){50}){50}")


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


SCHEMAS: tuple[dict[str, Any], ...] = (
    {"enum": [f"value {i}" for i in range(4_000)]},
    {"allOf": [{"type": "string", "pattern": f"^(a|b)*{c}(a|b){{12}}$"} for c in "abab"]},
    {"$ref": "#/$defs/x", "$defs": {"x": {"anyOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/x"}]}}},
    {"$ref": "#/nowhere"},
    {"type": "array", "items": {"type": "string"}, "minItems": 100_000},
    {"type": "object", "properties": {f"key{i}": {"type": "string"} for i in range(1_500)}},
    {"type": "string", "minLength": 10**9},
    deep(60),
    {"not": {"type": "string"}},
)


async def dear(storm: Storm, number: int) -> str:
    return await storm.post(COMPLETIONS, ONCE | {"guided_grammar": DEAR, "seed": number})


async def dear_answers(storm: Storm, number: int) -> str:
    return await storm.post(COMPLETIONS, ONCE | {"guided_grammar": DEAR, "n": 8, "seed": number})


async def patterns(storm: Storm, number: int) -> str:
    return await storm.post(COMPLETIONS, ONCE | {"guided_regex": PATTERNS[number % len(PATTERNS)]})


async def schemas(storm: Storm, number: int) -> str:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 16}
    schema = {"name": "x", "schema": SCHEMAS[number % len(SCHEMAS)]}
    return await storm.post(CHAT, body | {"response_format": {"type": "json_schema", "json_schema": schema}})


async def slow_to_compile(storm: Storm, number: int) -> str:
    """A different one each time, so that no cache helps."""
    parts = [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(1 + number, 40 + number)]
    return await storm.post(COMPLETIONS, ONCE | {"guided_json": {"allOf": parts}})


async def many(storm: Storm, number: int) -> str:
    """Thousands of small ones; the cache of them is bounded."""
    words = [f"{word}{number}" for word in ("red", "green", "blue")]
    return await storm.post(COMPLETIONS, ONCE | {"guided_choice": words, "max_tokens": 8})


ANY = (ANSWERED, REFUSED, FAILED)
WAVES = (
    Wave("one dear grammar", dear, 2, 1, ANY),
    Wave("eight dear answers", dear_answers, 1, 1, ANY, counted=False),
    Wave("32 dear grammars", dear, 32, 32, ANY),
    Wave("patterns", patterns, 30, 5, ANY),
    Wave("schemas", schemas, 36, 6, ANY),
    Wave("slow to compile", slow_to_compile, 15, 15, (ANSWERED, REFUSED)),
    Wave("many grammars", many, 600, 20, (ANSWERED, REFUSED)),
)

if __name__ == "__main__":
    sys.exit(main(__doc__ or "", WAVES))
