"""What one family does and the others do not."""

import pytest

from server.dialects.base import CallArguments, CallStart, Content, Dialect, Reasoning, ToolSpec
from server.dialects.detect import dialect_named
from tests.server.dialects.families import TOOLS, parts_of, read, specials

sizes = pytest.mark.parametrize("size", [0, 1, 5])
CALL = [CallStart(0, "add"), CallArguments(0, '{"a": 1}')]


def dialect(name: str) -> Dialect:
    return dialect_named(name, specials(name))


@sizes
@pytest.mark.parametrize(
    "body",
    [
        '{"arguments": {"a": 1}, "name": "add"}',
        '{"name": "add", "arguments": "{\\"a\\": 1}"}',
        '{"arguments": "{\\"a\\": 1}", "name": "add"}',
        '{"id": "c1", "type": "function", "name": "add", "parameters": {"a": 1}, "other": [1, {}]}',
        '{\n  "name" : "add" ,\n  "arguments" : {"a": 1}\n}',
        '{"name": "\\u0061dd", "arguments": {"a": 1}}',
    ],
)
def test_a_call_object_in_other_words(body: str, size: int) -> None:
    assert read(dialect("hermes"), f"<tool_call>{body}</tool_call>", size=size) == CALL
    assert read(dialect("mistral"), f"[TOOL_CALLS][{body}]", size=size) == CALL
    assert read(dialect("llama"), body, size=size) == CALL


@sizes
@pytest.mark.parametrize("arguments", ["", ', "arguments": null', ', "arguments": {}'])
def test_a_call_without_arguments_has_an_empty_object(arguments: str, size: int) -> None:
    text = f'<tool_call>{{"name": "add"{arguments}}}</tool_call>'
    assert read(dialect("hermes"), text, size=size) == parts_of([("add", "{}")])


@sizes
@pytest.mark.parametrize(
    "body",
    [
        "{}",
        "[]",
        "add(1)",
        '{"name": 1}',
        '{"name": ""}',
        '{"name": "a\\nb"}',
        '{"name": "\\ud83d"}',
        '{"naem": "add", "arguments": {}}',
        '{"arguments": {"a": 1}}',
        '{"arguments": {"a": 1}, "name"',
        '{"name" "add"}',
        '{"name": "add',
        '{"function": {"name": "add", "arguments": {}}}',
        '{"arguments": {"a": <}, "name": "add"}',
    ],
)
def test_an_object_that_is_no_call_is_content(body: str, size: int) -> None:
    for name, text in (("hermes", f"a <tool_call>\n{body}"), ("mistral", f"[TOOL_CALLS] [{body}"), ("llama", body)):
        assert read(dialect(name), text, size=size) == [Content(text)]


@sizes
def test_broken_arguments_end_at_the_delimiter(size: int) -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": 1</tool_call>\n<tool_call>{"name": "add", "arguments": {}}'
    expected = [CallStart(0, "add"), CallArguments(0, '{"a": 1'), CallStart(1, "add"), CallArguments(1, "{}")]
    assert read(dialect("hermes"), text, size=size) == expected


@sizes
def test_what_stands_too_much_in_a_call_is_content(size: int) -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": 1}}}\n</tool_call>\n<tool_call>{"name": "add"}</tool_call>'
    expected = [*CALL, Content("}"), CallStart(1, "add"), CallArguments(1, "{}")]
    assert read(dialect("hermes"), text, size=size) == expected


def test_a_delimiter_inside_an_argument_is_argument() -> None:
    call = ("add", '{"a": "</tool_call><tool_call>", "b": "<|call|>"}')
    assert read(dialect("hermes"), f'<tool_call>{{"name": "add", "arguments": {call[1]}}}</tool_call>') == parts_of(
        [call]
    )
    text = f"<|channel|>commentary to=functions.add<|message|>{call[1]}<|call|>"
    assert read(dialect("harmony"), text, size=1) == parts_of([call])


@sizes
def test_a_quoted_think_delimiter_opens_no_reasoning(size: int) -> None:
    text = "R1 writes <think> before it answers, and </think> after."
    assert read(dialect("hermes"), text, size=size) == [Content(text)]
    assert read(dialect("plain"), f"<think>{text}", size=size) == [Content(f"<think>{text}")]


@sizes
def test_a_think_token_opens_reasoning_anywhere(size: int) -> None:
    text = "Well. [THINK]hm[/THINK] So. [THINK] ha [/THINK]"
    expected = [Content("Well."), Reasoning("hm"), Content(" So."), Reasoning(" ha")]
    assert read(dialect("mistral"), text, size=size) == expected


@sizes
def test_a_model_may_open_again_what_the_prompt_opened(size: int) -> None:
    parts = [Reasoning("hm"), Content("Hi")]
    assert read(dialect("deepseek"), "<think>\nhm</think>Hi", "…<think>\n", size=size) == parts


@pytest.mark.parametrize("name", ["plain", "hermes", "llama"])
def test_whitespace_waits_only_where_a_delimiter_may_follow(name: str) -> None:
    parser = dialect(name).parser("", ())
    assert parser.push("Hi\n") == [Content("Hi\n")]
    assert parser.push("\n") == [Content("\n")]
    parser = dialect("hermes").parser("", TOOLS)
    assert parser.push("Hi\n") == [Content("Hi")]
    assert parser.push(" ") == []
    assert parser.push("x") == [Content("\n x")]


@sizes
def test_a_prompt_that_closed_the_reasoning(size: int) -> None:
    assert read(dialect("deepseek"), "Hi</think>", "…<think></think>", size=size) == [Content("Hi</think>")]


@sizes
def test_mistral_without_delimiters_between_name_and_arguments(size: int) -> None:
    assert read(dialect("mistral"), '[TOOL_CALLS]add{"a": 1}', size=size) == CALL
    text = "[TOOL_CALLS]add, and [TOOL_CALLS] " + "x" * 300 + "[ARGS]{}"
    assert read(dialect("mistral"), text, size=size) == [Content(text)]


@sizes
def test_a_mistral_array_that_breaks_later(size: int) -> None:
    text = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, {"nam": 2}]'
    assert read(dialect("mistral"), text, size=size) == [*CALL, Content(', {"nam": 2}]')]


@sizes
@pytest.mark.parametrize("between", ["; ", "\n", ";", "", "<|python_tag|>"])
def test_llama_separators(between: str, size: int) -> None:
    call = '{"name": "add", "parameters": {"a": 1}}'
    expected = [*CALL, CallStart(1, "add"), CallArguments(1, '{"a": 1}')]
    assert read(dialect("llama"), f"{call}{between}{call}", size=size) == expected


@sizes
@pytest.mark.parametrize("text", ['{"name": "Ada", "parameters": {}}', '{"name": "Ada", "age": 36}', '  {"x": 1}'])
def test_llama_json_that_names_no_tool_is_content(text: str, size: int) -> None:
    assert read(dialect("llama"), text, size=size) == [Content(text)]
    tagged = f"<|python_tag|>{text}"
    assert read(dialect("llama"), tagged, size=size) == [Content(tagged)]


@sizes
def test_llama_calls_only_with_tools_and_only_first(size: int) -> None:
    call = '{"name": "add", "parameters": {"a": 1}}'
    assert read(dialect("llama"), call, tools=(), size=size) == [Content(call)]
    assert read(dialect("llama"), f"So: {call}", size=size) == [Content(f"So: {call}")]
    assert read(dialect("llama"), f"So:\n<|python_tag|>{call} ok", size=size) == [Content("So:"), *CALL, Content(" ok")]


def test_llama_json_is_let_go_as_soon_as_it_is_none() -> None:
    parser = dialect("llama").parser("", TOOLS)
    assert parser.push('{"title"') == [Content('{"title"')]


@sizes
def test_deepseek_tool_called_function(size: int) -> None:
    text = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    assert read(dialect("deepseek"), text, size=size) == parts_of([("function", "{}")])


@sizes
def test_harmony_channels(size: int) -> None:
    text = (
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I will look. <|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}\n<|call|>'
    )
    expected = [Reasoning("One.\nTwo."), Content("I will look."), *CALL]
    assert read(dialect("harmony"), text, size=size) == expected


@sizes
def test_harmony_preamble_and_final_are_two_lines(size: int) -> None:
    text = "<|channel|>commentary<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B<|return|>"
    assert read(dialect("harmony"), text, size=size) == [Content("A\nB")]


@sizes
def test_harmony_without_tools_shows_a_call_as_written(size: int) -> None:
    for channel in ("commentary", "analysis"):
        text = f"<|channel|>{channel} to=functions.add <|constrain|>json<|message|>{{}}"
        assert read(dialect("harmony"), text, tools=(), size=size) == [Content(text)]


@sizes
def test_harmony_builtin_tools_and_other_bodies(size: int) -> None:
    text = "<|channel|>analysis to=python code<|message|>print(x, 'y')\n<|call|>"
    expected = [CallStart(0, "python"), CallArguments(0, "print(x, 'y')")]
    assert read(dialect("harmony"), text, size=size) == expected


@sizes
@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("Just text, <b>no</b> delimiters", "Just text, <b>no</b> delimiters"),
        ("<|channel|>final<|message|>Hi<|end|><|start|>assistant<|chan", "Hi"),
        ("<|channel|>final<|message|>Hi<|end|>", "Hi"),
        ("<|channel|>final<|message|>Hi<|end|>there", "Hithere"),
        ("<|channel|>anal", ""),
        ("<|channel|>commentary to=functions.ad", "<|channel|>commentary to=functions.ad"),
        ("<|channel|>Hello\nyou", "<|channel|>Hello\nyou"),
        ("<|channel|>final<|message|>Hi<|channel|>final<|message|>ho", "Hi\nho"),
    ],
)
def test_harmony_headers_that_are_none(text: str, content: str, size: int) -> None:
    assert read(dialect("harmony"), text, size=size) == ([Content(content)] if content else [])


@sizes
def test_harmony_body_that_the_prompt_began(size: int) -> None:
    prompt = "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>"
    assert read(dialect("harmony"), "Hello<|return|>", prompt, size=size) == [Content("Hello")]
    ended = "<|start|>assistant<|channel|>analysis<|message|>x<|end|>"
    assert read(dialect("harmony"), "Hello", ended, size=size) == [Content("Hello")]


def test_ends_and_delimiters_are_tokens_of_the_checkpoint() -> None:
    assert dialect("harmony").end_tokens == ("<|return|>", "<|call|>")
    assert dialect_named("harmony", {"<|return|>": 5}).end_tokens == ("<|return|>",)
    assert dialect_named("mistral", {"[TOOL_CALLS]": 5}).delimiters == ("[TOOL_CALLS]",)
    assert dialect_named("hermes", {}).delimiters == ()
    assert dialect("llama").end_tokens == ("<|eom_id|>",)


def test_a_long_call_is_read_in_time_that_grows_with_it() -> None:
    call = ("add", '{"text": "' + "a\\n" * 30_000 + '"}')
    text = f'<tool_call>{{"name": "add", "arguments": {call[1]}}}</tool_call>'
    assert read(dialect("hermes"), text, size=3) == parts_of([call])
    assert read(dialect("hermes"), "\n" * 60_000, size=3) == [Content("\n" * 60_000)]


def test_a_deep_value_does_not_overflow() -> None:
    call = ("add", '{"a": ' + "[" * 5000 + "]" * 5000 + "}")
    assert read(dialect("hermes"), f'<tool_call>{{"arguments": {call[1]}, "name": "add"}}') == parts_of([call])


def test_names_are_not_checked_where_delimiters_are_certain() -> None:
    text = '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'
    assert read(dialect("hermes"), text, tools=[ToolSpec("add")]) == parts_of([("unknown", "{}")])
