"""Text as it leaves: whole characters, and never a part of a stop string, however the text is split."""

from hypothesis import given
from hypothesis import strategies as st

from engine.types import Logprob, TokenEvent
from server.generation.output_processor import OutputProcessor, StopMatcher
from tests.server.fakes import EOS, FakeDecoder

TEXT = st.text("ab\n", max_size=24)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4)


def first_completed(text: str, stops: list[str]) -> str:
    """The definition: cut at the start of the match that completes first; of two, the longer."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(TEXT, STOPS, st.lists(st.integers(1, 6), max_size=24))
def test_the_result_does_not_depend_on_how_text_is_split(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher, shown, rest = StopMatcher(stops), "", text
    for size in [*sizes, len(text) + 1]:
        shown += matcher.push(rest[:size])
        rest = rest[size:]
        assert first_completed(text, stops).startswith(shown)
        if matcher.matched:
            break
    shown += "" if matcher.matched else matcher.flush()
    assert shown == first_completed(text, stops)


@given(st.text(max_size=30), STOPS)
def test_text_is_held_no_longer_than_needed(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = matcher.push(text)
    held = text[len(shown) :]
    assert matcher.matched or not held or any(stop.startswith(held) for stop in stops)


def events(data: bytes, logprobs: bool = False) -> list[TokenEvent]:
    logprob = Logprob(-1.0, ((65, float("-inf")),)) if logprobs else None
    tokens = [TokenEvent("r", byte, logprob) for byte in data]
    return [*tokens, TokenEvent("r", EOS, logprob, "stop")]


@given(st.text(st.characters(exclude_characters="�"), max_size=20))
def test_characters_leave_whole_and_in_order(text: str) -> None:
    output = OutputProcessor(0, FakeDecoder(), [])
    deltas = [output.push(event) for event in events(text.encode("utf-8", "replace"))]
    assert "".join(delta.text for delta in deltas) == text.encode("utf-8", "replace").decode()
    assert all("�" not in delta.text for delta in deltas)
    assert deltas[-1].finish == "stop"


def test_half_a_character_at_the_end_is_shown_as_damaged_not_dropped() -> None:
    output = OutputProcessor(0, FakeDecoder(), [])
    first = output.push(TokenEvent("r", 0xE2))
    last = output.push(TokenEvent("r", 0x82, finish="length"))
    assert (first.text, last.text, last.finish) == ("", "�", "length")


def test_log_probabilities_leave_with_their_text_and_never_show_a_stop_string() -> None:
    output = OutputProcessor(0, FakeDecoder(), ["cde"])
    deltas = [output.push(event) for event in events(b"abcd", logprobs=True)]
    assert [len(delta.logprobs) for delta in deltas] == [1, 1, 0, 0, 2]
    assert [entry.offset for delta in deltas for entry in delta.logprobs] == [0, 1, 2, 3]
    assert deltas[0].logprobs[0].top == ((65, -9999.0),)
    stopped = OutputProcessor(0, FakeDecoder(), ["cd"])
    shown = [entry.token for event in events(b"abcd", logprobs=True)[:4] for entry in stopped.push(event).logprobs]
    assert bytes(shown) == b"ab"


def test_log_probabilities_of_a_split_character_are_all_kept() -> None:
    output = OutputProcessor(0, FakeDecoder(), [])
    deltas = [output.push(event) for event in events("€".encode(), logprobs=True)]
    assert [len(delta.logprobs) for delta in deltas] == [0, 0, 3, 0]
