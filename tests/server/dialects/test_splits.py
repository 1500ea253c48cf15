"""What an answer's parts join to does not depend on how it was split, and content loses nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.dialects.base import CallArguments, CallStart, Content, Reasoning
from tests.server.dialects.families import ADD, FAMILIES, TOOLS, WEATHER, Family, read, read_chunks

every = pytest.mark.parametrize("w", FAMILIES, ids=lambda w: w.id)
PROMPTS = ("", "<think>\n", "[THINK]", "<think></think>", "<|start|>assistant", "<|start|>assistant<|channel|>analysis")
DELIMITERS = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "[THINK]",
    "[/THINK]",
    "<|python_tag|>",
    "<|python_end|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "```json",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "```",
    "function",
    "<|start|>assistant",
    "<|channel|>",
    "analysis",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
    "to=functions.add",
    "<|constrain|>",
    "final",
    "<|",
    "<",
]
BITS = (
    *DELIMITERS,
    '{"name": "add", ',
    '"arguments": ',
    '"parameters": ',
    '{"a": "',
    '\\"',
    '"',
    "{",
    "}",
    "[",
    "]",
    "; ",
    ",",
)
text = st.lists(st.one_of(st.sampled_from(BITS), st.text(max_size=4), st.sampled_from([" ", "\n", "a"])), max_size=14)


def broken_up(draw: st.DrawFn, whole: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=20)))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


@every
@settings(max_examples=30, deadline=None)
@given(data=st.data(), bits=text, prompt=st.sampled_from(PROMPTS), with_tools=st.booleans())
def test_any_text_in_any_parts(w: Family, data: st.DataObject, bits: list[str], prompt: str, with_tools: bool) -> None:
    whole, tools = "".join(bits), TOOLS if with_tools else ()
    chunks = data.draw(st.composite(broken_up)(whole))
    assert read_chunks(w.dialect, chunks, prompt, tools) == read(w.dialect, whole, prompt, tools)


@every
@settings(max_examples=20, deadline=None)
@given(data=st.data(), reasoning=st.sampled_from(["", "Let me see."]), end=st.integers(0, 400))
def test_a_cut_answer_in_any_parts(w: Family, data: st.DataObject, reasoning: str, end: int) -> None:
    whole = (w.reasoning(reasoning) if reasoning else "") + w.calls([WEATHER, ADD])
    chunks = data.draw(st.composite(broken_up)(whole[:end]))
    assert read_chunks(w.dialect, chunks, "", TOOLS) == read(w.dialect, whole[:end])


@every
@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    answer=st.text().filter(lambda text: not any(delimiter in text for delimiter in ("<|start|>", *DELIMITERS[:-2]))),
)
def test_content_loses_nothing(w: Family, data: st.DataObject, answer: str) -> None:
    whole = w.content(answer)
    chunks = data.draw(st.composite(broken_up)(whole))
    assert read_chunks(w.dialect, chunks, "", TOOLS) == ([Content(answer)] if answer else [])


@every
@settings(max_examples=30, deadline=None)
@given(bits=text)
def test_every_character_that_is_shown_was_written_in_this_order(w: Family, bits: list[str]) -> None:
    """Parts are chunks of the text: apart from decoded names and the line between two messages nothing is made up."""
    whole, at = "".join(bits), 0
    for part in read(w.dialect, whole):
        if isinstance(part, CallStart) or (isinstance(part, CallArguments) and part.text == "{}"):
            continue
        for char in part.text.replace("\n", "") if w.id.startswith("harmony") else part.text:
            found = whole.find(char, at)
            assert found != -1 or isinstance(part, CallArguments)
            at = found + 1 if found != -1 else at


@pytest.mark.parametrize("w", [w for w in FAMILIES if not w.id.startswith("harmony")], ids=lambda w: w.id)
@settings(max_examples=30, deadline=None)
@given(bits=st.lists(st.sampled_from([bit for bit in BITS if bit not in ("[CALL_ID]", ",")]), max_size=14))
def test_no_word_is_lost(w: Family, bits: list[str]) -> None:
    """Outside of Harmony's headers every word comes out, whatever delimiters and parts of JSON stand around it."""
    words = [f"w{i}w" for i in range(len(bits))]
    whole = "".join(bit + word for bit, word in zip(bits, words, strict=True))
    out = "".join(p.name if isinstance(p, CallStart) else p.text for p in read(w.dialect, whole))
    assert not [word for word in words if word not in out]


@every
def test_no_part_of_a_delimiter_is_shown_while_it_may_become_one(w: Family) -> None:
    whole = w.reasoning("Hm.") + w.calls([ADD, ADD]) if w.id != "plain" else w.calls([ADD, ADD])
    parser = w.dialect.parser("", TOOLS)
    for char in whole:
        for part in parser.push(char):
            assert not isinstance(part, Content)
            assert not isinstance(part, Reasoning) or part.text in "Hm."
    assert not any(isinstance(part, Content | Reasoning) for part in parser.flush())
