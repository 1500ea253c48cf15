"""SandboxedTemplate and tokens as checkpoints have them, in extract."""

import pytest

from server.dialects.base import Content, Dialect, Reasoning, ToolSpec
from server.dialects.detect import DIALECTS, detect, dialect_named
from tests.server.dialects.families import read

QWEN3 = "{{- '<tool_call>\\n{\"name\": \"' }} ... {{- '<think>\\n\\n</think>\\n\\n' }}"
QWEN25 = '{{- \'<tool_call>\\n{"name": "\' }}'
R1 = "{{'<｜tool▁calls▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + '```json'}} ... <｜Assistant｜><think>\\n"
V31 = "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ name + '<｜tool▁sep｜>' }} </think>"
LLAMA31 = "{{- '<|python_tag|>' + tool_call.name }}"
LLAMA32 = '{"name": function name, "parameters": dictionary of argument name and its value}'
MISTRAL = '{{- "[TOOL_CALLS] [" }}'
LLAMA_TOKENS = {"<|python_tag|>": 128010, "<|eom_id|>": 128008}
MISTRAL_TOKENS = {"[TOOL_CALLS]": 9, "[THINK]": 34, "[/THINK]": 35}


@pytest.mark.parametrize(
    ("template", "specials", "name"),
    [
        (None, {}, "plain"),
        ("{{ message.content }}", {"<|endoftext|>": 0}, "plain"),
        ("{{ message.content }} <think>", {}, "hermes"),
        (QWEN25, {}, "hermes"),
        (QWEN3, {}, "hermes"),
        (QWEN25, LLAMA_TOKENS, "hermes"),
        (R1, {}, "deepseek"),
        (R1, LLAMA_TOKENS, "deepseek"),
        (V31, {}, "deepseek"),
        (MISTRAL, {}, "mistral"),
        ("{{ message.content }}", MISTRAL_TOKENS, "mistral"),
        ("{{ message.content }} <think>", MISTRAL_TOKENS, "mistral"),
        (LLAMA31, LLAMA_TOKENS, "llama"),
        (LLAMA32, {}, "llama"),
        (None, LLAMA_TOKENS, "llama"),
        ("<|channel|>analysis<|message|>", {}, "harmony"),
        (None, {"<|channel|>": 200005}, "harmony"),
    ],
)
def test_families(template: str | None, specials: dict[str, int], name: str) -> None:
    assert detect(template, specials).name == name


def thinks(dialect: Dialect) -> bool:
    return "moe_thought" in dialect.call_grammar("", [ToolSpec("t")], False)


def test_reasoning_are_forced_first_only_where_they_are_known() -> None:
    assert thinks(detect(QWEN3, {})) and thinks(detect(R1, {})) and thinks(detect(None, MISTRAL_TOKENS))
    assert not thinks(detect(QWEN25, {})) and not thinks(detect(MISTRAL, {})) and not thinks(detect(None, {}))
    assert thinks(dialect_named("hermes", {})) and not thinks(dialect_named("hermes", {}, template=QWEN25))


def test_added_tokens_tell_a_family_but_no_reasoning() -> None:
    tokens = {"<tool_call>": 5, "</tool_call>": 6, "<think>": 7, "</think>": 8}
    dialect = detect(None, {}, tokens)
    assert dialect.name == "hermes" and dialect.delimiters == () and not thinks(dialect)
    assert "<[5]>" in dialect.call_grammar("", [ToolSpec("t")], False)
    assert "<[8]>" in dialect.call_grammar("<think>\n", [ToolSpec("t")], False)


def test_reasoning_are_read_at_the_start_even_where_they_are_not_known() -> None:
    assert read(detect(QWEN25, {}), "<think>a</think>b") == [Reasoning("a"), Content("b")]
    assert read(detect(MISTRAL, {"[TOOL_CALLS]": 9}), "[THINK]a[/THINK]b") == [Reasoning("a"), Content("b")]


def test_delimiters_that_are_special_tokens_are_listed() -> None:
    assert detect(None, MISTRAL_TOKENS).delimiters == ("[TOOL_CALLS]", "[THINK]", "[/THINK]")
    assert detect(LLAMA31, LLAMA_TOKENS).delimiters == ("<|python_tag|>",)
    assert detect(QWEN3, {"<|im_end|>": 1}).delimiters == ()


def test_the_older_deepseek_fences_its_arguments() -> None:
    assert "```json" in detect(R1, {}).call_grammar("", [ToolSpec("t")], False)
    assert "```json" not in detect(V31, {}).call_grammar("", [ToolSpec("t")], False)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_name(name: str) -> None:
    assert dialect_named(name, {}).name == name


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"plain, deepseek, harmony, hermes, llama, mistral, got 'qwen'"):
        dialect_named("qwen", {})
