"""Words at the edge of a terminal: what is on its lines is never wider, and no character is lost, however it is cut."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from terminal.screen import Screen
from terminal.wrap import ERASE, WordWrap


def drawn(parts: list[str], width: int) -> list[str]:
    """The lines of a terminal to which the parts of a stream are written."""
    wrap, lines = WordWrap(), [""]
    for text in re.split(rf"({re.escape(ERASE)}|\n)", "".join(wrap.feed(part, width) for part in parts)):
        if text == ERASE:
            lines[-1] = ""
        elif text == "\n":
            lines.append("")
        else:
            lines[-1] += text
    return lines


def test_words_move_whole() -> None:
    assert drawn(["The cat sa", "t on the ma", "t."], 12) == ["The cat sat", "on the mat."]
    assert drawn(["The cat sat on it"], 12) == ["The cat sat", "on it"]


def test_lines_of_the_model_stay() -> None:
    assert drawn(["one\n\n  two three fo", "ur"], 12) == ["one", "", "  two three", "four"]
    assert drawn(["a\tb"], 40) == ["a       b"]


def test_what_has_no_blanks_is_cut() -> None:
    assert drawn(["x" * 12], 6) == ["xxxxx", "xxxxx", "xx"]
    assert drawn(["\u4f60\u597d" * 3], 6) == ["\u4f60\u597d"] * 3


@given(st.lists(st.text(st.sampled_from("ab \n\t\u4f60"), max_size=30)), st.integers(4, 40))
def test_nothing_is_lost_or_too_wide(parts: list[str], width: int) -> None:
    lines = drawn(parts, width)
    assert all(cell_len(line) < width for line in lines)
    assert "".join("".join(lines).split()) == "".join("".join(parts).split())
    assert lines == drawn(list("".join(parts)), width)  # cut elsewhere, the same


@pytest.mark.parametrize(
    ("interactive", "shown"), [(True, f"one two t{ERASE}one two\nthree\nnote\n"), (False, "one two three\n")]
)
def test_the_screen_wraps_for_a_terminal_only(
    interactive: bool, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    screen = Screen(interactive)
    for part in ("one ", "two t", "hree"):
        screen.show(("text", part))
    screen.note("note")
    screen.close_line()
    assert capsys.readouterr().out == shown
