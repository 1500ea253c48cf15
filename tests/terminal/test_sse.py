"""Events are read the same however the network cuts them, and nothing but an announced end is an end."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terminal import sse
from terminal.errors import StreamFailed
from terminal.sse import EventParser

STREAM = (
    b': waiting\n\nevent: message\nid: 7\ndata: {"a": 1}\n\ndata:{"b":\ndata: 2}\r\n\r\n\n\ndata: {"c": "\\u001b"}\n\n'
    b'data: [DONE]\n\ndata: {"late": 1}\n\n'
)
CHUNKS = [{"a": 1}, {"b": 2}, {"c": "\x1b"}]


def read(*parts: bytes) -> tuple[list[Any], EventParser]:
    chunks = EventParser()
    return [chunk for part in parts for chunk in chunks.feed(part)], chunks


@given(st.lists(st.integers(0, len(STREAM))))
def test_cuts_change_nothing(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    found, chunks = read(*(STREAM[a:b] for a, b in itertools.pairwise(places)))
    assert found == CHUNKS
    chunks.end()


def test_a_silent_end_is_a_failure() -> None:
    _, chunks = read(b'data: {"a": 1}\n\ndata: [DONE]\n')  # the blank line that would complete it never came
    with pytest.raises(StreamFailed, match="before the answer was complete"):
        chunks.end()


@pytest.mark.parametrize(
    ("data", "message", "kind"),
    [
        (b'event: error\ndata: {"error": {"message": "too\\nslow", "code": "timeout"}}', "too slow", "timeout"),
        (b'data: {"error": {"message": "as vLLM says it", "type": "BadRequest"}}', "as vLLM", "BadRequest"),
        (b'data: {"error": "a text"}', "a text", "unnamed"),
        (b'event: error\ndata: {"message": "bare"}', "bare", "unnamed"),
        (b"event: error\ndata: {}", "no reason given", "unnamed"),
        (b"data: <html>\x1b", "no JSON object", "bad event"),
        (b"data: [1]", "no JSON object", "bad event"),
    ],
)
def test_failures_are_told(data: bytes, message: str, kind: str) -> None:
    with pytest.raises(StreamFailed, match=message) as failure:
        read(data + b"\n\n")
    assert kind in failure.value.kind
    assert "\x1b" not in str(failure.value)


def test_an_error_event_does_not_colour_the_next() -> None:
    assert read(b'event: error\n\ndata: {"a": 1}\n\n')[0] == [{"a": 1}]


@pytest.mark.parametrize("part", [b"data: " + b"x" * 90, b"data: x\n" * 20])
def test_memory_is_bounded(part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 80)
    with pytest.raises(StreamFailed, match="longer than 80 bytes"):
        read(part)
