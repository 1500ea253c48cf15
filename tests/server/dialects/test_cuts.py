"""Answers that a limit or a stop string cuts, and answers that end with their first call: no markup shows."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.types import Finish, TokenEvent
from server.dialects.base import CallArguments, CallStart, Content, DeltaPart, Dialect, Reasoning
from server.dialects.detect import dialect_named
from server.formats.base import calls_of, content_of, reasoning_of
from server.generation.output_processor import OutputProcessor
from tests.server.dialects.families import ADD, FAMILIES, TOOLS, WEATHER, Family, joined, parts_of
from tests.server.dialects.test_splits import PROMPTS, broken_up, text
from tests.server.fakes import FakeDecoder

every = pytest.mark.parametrize("w", FAMILIES, ids=lambda w: w.id)
INNER = ("get_weather", '{"city": "<tool_call>", "n": [1, {"a": "}"}]}')


def cut(dialect: Dialect, chunks: Sequence[str], prompt: str = "", single: bool = False) -> list[DeltaPart]:
    parser = dialect.parser(prompt, TOOLS, single)
    parts = [part for chunk in chunks for part in parser.push(chunk)]
    return joined([*parts, *parser.flush(cut=True)])


def answered(
    w: Family, data: bytes, finish: Finish, stops: Sequence[str] = (), single: bool = False
) -> OutputProcessor:
    """A byte a token, ended by the engine after the last one. What was shown is in `shown`."""
    output = OutputProcessor(0, FakeDecoder(), stops, w.dialect.parser("", TOOLS, single))
    shown[:] = []
    for i, byte in enumerate(data, 1):
        event = TokenEvent("r", byte, finish=finish if i == len(data) else None)
        shown.extend(output.push(event).parts)
        if output.finish is not None:
            break
    return output


shown: list[DeltaPart] = []


@every
def test_a_call_that_is_cut_anywhere_shows_no_markup(w: Family) -> None:
    whole = w.calls([INNER, ADD])
    names, arguments = [INNER[0], ADD[0]], [INNER[1], ADD[1]]
    for end in range(len(whole) + 1):
        parts = cut(w.dialect, [whole[:end]])
        assert not content_of(parts).strip() and not reasoning_of(parts), whole[:end]
        calls = calls_of(parts)
        assert [name for name, _ in calls] == names[: len(calls)]
        assert all(full.startswith(chunk) for full, (_, chunk) in zip(arguments, calls, strict=False))
        assert parts == cut(w.dialect, whole[:end])
    assert calls == [INNER, ADD]


@every
def test_what_stands_before_a_cut_call_stays(w: Family) -> None:
    if w.id.startswith("llama"):
        pytest.skip("its calls are the whole answer")
    said = w.content("Let me see.")
    said += "<|end|><|start|>assistant" if w.id.startswith("harmony") else "\n"
    for end in range(1, len(w.calls([ADD]))):
        parts = cut(w.dialect, [said + w.calls([ADD])[:end]])
        assert content_of(parts).rstrip() == "Let me see.", end


@every
def test_reasoning_that_is_cut_anywhere_shows_no_delimiter(w: Family) -> None:
    if w.id == "plain":
        pytest.skip("it has no reasoning")
    whole = w.reasoning("Hm.") + w.content("Yes.")
    for end in range(len(whole)):
        parts = cut(w.dialect, whole[:end])
        assert "Yes.".startswith(content_of(parts)) and "Hm.".startswith(reasoning_of(parts).strip()), whole[:end]


@every
@settings(max_examples=30, deadline=None)
@given(data=st.data(), bits=text, prompt=st.sampled_from(PROMPTS), single=st.booleans())
def test_any_text_in_any_parts(w: Family, data: st.DataObject, bits: list[str], prompt: str, single: bool) -> None:
    whole = "".join(bits)
    chunks = data.draw(st.composite(broken_up)(whole))
    parts = cut(w.dialect, chunks, prompt, single)
    assert parts == cut(w.dialect, [whole], prompt, single)
    assert not single or sum(isinstance(part, CallStart) for part in parts) <= 1


@every
def test_half_a_character_of_a_delimiter_is_dropped_with_it(w: Family) -> None:
    whole = w.calls([ADD]).encode()
    for end in range(1, len(whole)):
        answer = answered(w, whole[:end], "length")
        assert answer.finish == "length" and not content_of(shown).strip(), whole[:end]


@every
def test_a_stop_string_within_a_call(w: Family) -> None:
    """A call that it cuts is none to be made: the reason is not `tool_calls`."""
    answer = answered(w, w.calls([WEATHER]).encode(), "stop", ["Köln"])
    assert answer.finish == "stop" and joined(shown) == [CallStart(0, "get_weather"), CallArguments(0, '{"city": "')]
    answer = answered(w, w.calls([WEATHER]).encode(), "stop", ["get_w"])
    assert answer.finish == "stop" and not content_of(shown)
    if not w.id.startswith("harmony"):
        answer = answered(w, (w.calls([ADD]) + "\nSTOP!").encode(), "stop", ["STOP"])
        assert answer.finish == "tool_calls" and joined(shown) == parts_of([ADD])


@every
def test_one_call_ends_an_answer(w: Family) -> None:
    ended = "<|call|>" if w.id.startswith("harmony") else ""
    data = (w.calls([INNER, ADD]) + f"{ended}\nAnd more.").encode()
    for finish in ("stop", "length"):
        answer = answered(w, data, finish, single=True)
        assert answer.finish == "tool_calls" and joined(shown) == parts_of([INNER])
    assert cut(w.dialect, [data.decode()], single=True) == parts_of([INNER])
    assert len(calls_of(cut(w.dialect, [data.decode()]))) == 2
    at = data.index(INNER[1].encode()) + 5
    answer = answered(w, data[:at], "length", single=True)
    assert answer.finish == "length" and calls_of(shown) == [(INNER[0], INNER[1][:5])]


@every
def test_after_a_broken_call_there_is_no_other(w: Family) -> None:
    broken = w.calls([("add", '{"a": <')])
    parts = cut(w.dialect, [broken, w.calls([ADD])], single=True)
    assert len(calls_of(parts)) <= 1


def test_a_text_that_only_looks_like_a_delimiter_is_whole_where_the_model_ended_it() -> None:
    hermes = dialect_named("hermes", {})
    for answer in ("a <", "a <tool_call>", 'a <tool_call>{"na', "a </tool"):
        parser = hermes.parser("", TOOLS)
        assert joined([*parser.push(answer), *parser.flush()]) == [Content(answer)]
        assert cut(hermes, answer) == [Content("a ")]
    assert cut(hermes, "a <b") == [Content("a <b")] and cut(hermes, "<think>x</thi") == [Reasoning("x")]
