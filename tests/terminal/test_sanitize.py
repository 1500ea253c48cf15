"""What may reach a terminal: no text of a server can steer it."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terminal.sanitize import MAX_LINE, one_line, plain

ANY = st.text(st.characters(codec=None) | st.sampled_from("\x1b\x9b\x07\r\n\t[31m"))


@given(ANY)
def test_no_control_character_is_left(text: str) -> None:
    assert all(unicodedata.category(c) not in ("Cc", "Cs") or c in "\n\t" for c in plain(text))


@given(ANY, ANY)
def test_a_sequence_cut_by_chunks_is_as_harmless(first: str, second: str) -> None:
    assert plain(first) + plain(second) == plain(first + second)


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]) | st.sampled_from("\n\t")))
def test_other_text_is_untouched(text: str) -> None:
    assert plain(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "␛[31mred"),
        ("\x1b]0;title\x07", "␛]0;title␇"),
        ("\x9b2J", "<9b>2J"),
        ("a\x7f\x08b", "a␡␈b"),
        ("one\r\ntwo", "one\ntwo"),
        ("honest\rforged", "honestforged"),
    ],
)
def test_examples(text: str, shown: str) -> None:
    assert plain(text) == shown


@given(ANY)
def test_one_line_is_one_line_and_short(text: str) -> None:
    line = one_line(text)
    assert "\n" not in line and "\t" not in line and len(line) <= MAX_LINE + 2
