"""Every family: calls, reasoning and content out of an answer. What one family alone does is in test_families.py."""

import pytest

from server.dialects.base import CallArguments, CallStart, Content, Reasoning
from tests.server.dialects.families import (
    ADD,
    FAMILIES,
    TAGGED,
    THINKING,
    TOOLS,
    WEATHER,
    Family,
    parts_of,
    read,
)

every = pytest.mark.parametrize("w", FAMILIES, ids=lambda w: w.id)
thinking = pytest.mark.parametrize("w", THINKING, ids=lambda w: w.id)
tagged = pytest.mark.parametrize("w", TAGGED, ids=lambda w: w.id)
sizes = pytest.mark.parametrize("size", [0, 1, 7])
TEXT = 'Hello {"a": 1} <b>, [x] 你好\n\n    and more. '


@every
@sizes
def test_an_answer_is_content(w: Family, size: int) -> None:
    assert read(w.dialect, w.content(TEXT), size=size) == [Content(TEXT)]
    assert read(w.dialect, w.content(TEXT), tools=(), size=size) == [Content(TEXT)]


@every
@sizes
def test_one_call(w: Family, size: int) -> None:
    assert read(w.dialect, w.calls([WEATHER]), size=size) == parts_of([WEATHER])


@every
@sizes
def test_several_calls(w: Family, size: int) -> None:
    calls = [WEATHER, ADD, ("add", "{}")]
    assert read(w.dialect, w.calls(calls), size=size) == parts_of(calls)


@thinking
@sizes
def test_reasoning_then_call(w: Family, size: int) -> None:
    text = w.reasoning("I should\n\ncall.") + w.calls([ADD])
    assert read(w.dialect, text, size=size) == [Reasoning("I should\n\ncall."), *parts_of([ADD])]


@thinking
@sizes
@pytest.mark.parametrize("tools", [TOOLS, ()])
def test_reasoning_then_content(w: Family, size: int, tools: tuple) -> None:
    text = w.reasoning("Hm.") + w.content("Hi there.\n")
    assert read(w.dialect, text, tools=tools, size=size) == [Reasoning("Hm."), Content("Hi there.\n")]


@thinking
@sizes
def test_reasoning_that_the_prompt_opened(w: Family, size: int) -> None:
    text = w.reopened("Hm.") + w.content("  Hi.")
    assert read(w.dialect, text, f"question{w.opened}", size=size) == [Reasoning("Hm."), Content("  Hi.")]
    text = w.reopened("Hm.") + w.calls([ADD])
    assert read(w.dialect, text, f"question{w.opened}", size=size) == [Reasoning("Hm."), *parts_of([ADD])]


@thinking
def test_reasoning_that_never_closes(w: Family) -> None:
    assert read(w.dialect, "on and on", w.opened, size=1) == [Reasoning("on and on")]


@every
@sizes
def test_arguments_that_are_cut_stay(w: Family, size: int) -> None:
    text = w.calls([WEATHER])
    text = text[: text.index("<", text.index("deep")) + 1]
    name, arguments = WEATHER
    expected = [CallStart(0, name), CallArguments(0, arguments[: arguments.index("<") + 1])]
    assert read(w.dialect, text, size=size) == expected


@every
def test_arguments_and_names_come_as_they_are_written(w: Family) -> None:
    """A name when it is whole, and every character of the arguments with the push that brings it."""
    text, (name, arguments) = w.calls([WEATHER]), WEATHER
    parser, seen, got, at = w.dialect.parser("", TOOLS), "", "", text.index(arguments)
    for i, char in enumerate(text):
        for part in parser.push(char):
            seen = part.name if isinstance(part, CallStart) else seen
            got += part.text if isinstance(part, CallArguments) else ""
        assert got == arguments[: max(0, i + 1 - at)]
        assert seen == (name if i + 1 >= at else seen)
    assert seen == name


@tagged
@sizes
def test_delimiters_are_text_without_tools(w: Family, size: int) -> None:
    text = "See: " + w.calls([ADD, ADD])
    assert read(w.dialect, text, tools=(), size=size) == [Content(text)]


@tagged
@sizes
def test_text_before_a_call_loses_only_its_last_spaces(w: Family, size: int) -> None:
    assert read(w.dialect, f"  One moment.\n\n{w.calls([ADD])}\n", size=size) == [
        Content("  One moment."),
        *parts_of([ADD]),
    ]


@tagged
@sizes
def test_text_after_a_call(w: Family, size: int) -> None:
    assert read(w.dialect, f"{w.calls([ADD])}\n\n Done.", size=size) == [*parts_of([ADD]), Content(" Done.")]


@tagged
@sizes
@pytest.mark.parametrize("cut", [3, 12, 16])
def test_a_call_cut_before_its_name_is_content(w: Family, size: int, cut: int) -> None:
    text = "Oh: " + w.calls([("get_weather_of_the_day", "{}")])[:cut]
    assert "get_weather_of_the_day" not in text
    assert read(w.dialect, text, size=size) == [Content(text)]


@tagged
@sizes
def test_a_delimiter_without_a_call_is_content(w: Family, size: int) -> None:
    delimiter = w.calls([ADD])[: w.calls([ADD]).index("]" if w.id.startswith("mistral") else ">") + 1]
    text = f"The delimiter {delimiter} \n is used, {delimiter}{delimiter} like so {delimiter}"
    assert read(w.dialect, text, size=size) == [Content(text)]
    assert read(w.dialect, text + w.calls([ADD]), size=size) == [Content(text), *parts_of([ADD])]


@every
@sizes
def test_whitespace_only_is_content(w: Family, size: int) -> None:
    assert read(w.dialect, w.content(" \n\n"), size=size) == [Content(" \n\n")]
    assert read(w.dialect, "", size=size) == []


@thinking
def test_empty_reasoning_leaves_nothing(w: Family) -> None:
    assert read(w.dialect, w.reasoning("\n") + w.content("Hi"), size=1) == [Content("Hi")]


@pytest.mark.parametrize("w", [w for w in THINKING if not w.id.startswith("harmony")], ids=lambda w: w.id)
@sizes
def test_a_delimiter_in_reasoning_is_reasoning(w: Family, size: int) -> None:
    reasoning = f"maybe {w.calls([ADD])} or not"
    assert read(w.dialect, w.reasoning(reasoning) + "No.", size=size) == [Reasoning(reasoning), Content("No.")]
