"""The items of a response's output while they are written: what each is when it is whole, and the events on the way.

They know neither the call nor the numbers of events.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

Event = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete"]
Entries = Sequence[Any]  # log-probabilities as they are written


class OutputItem:
    """`place` in the output; `key` makes ids of it that no other answer has."""

    prefix: str

    def __init__(self, key: str, place: int) -> None:
        self.key, self.place = f"{key}{place:03x}", place
        self.id = f"{self.prefix}_{self.key}"
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def whole(self, status: Status) -> dict[str, Any]:
        raise NotImplementedError

    def begin(self) -> Iterator[Event]:
        yield {"type": "response.output_item.added", "output_index": self.place, "item": self.whole("in_progress")}

    def add(self, text: str, entries: Entries) -> Event:
        self._texts.append(text)
        return self._delta(text, entries)

    def end(self, status: Status) -> Iterator[Event]:
        yield {"type": "response.output_item.done", "output_index": self.place, "item": self.whole(status)}

    def _delta(self, text: str, entries: Entries) -> Event:
        raise NotImplementedError

    def _here(self, kind: str) -> Event:
        return {"type": f"response.{kind}", "item_id": self.id, "output_index": self.place}


class Parted(OutputItem):
    """An item with one part, which is text."""

    part: str
    rest: dict[str, Any]  # of the item

    def whole(self, status: Status) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part()]
        return {"id": self.id, **self.rest, "status": status, "content": content}

    def begin(self) -> Iterator[Event]:
        yield from super().begin()
        yield self._here("content_part.added") | {"content_index": 0, "part": self._part()}

    def end(self, status: Status) -> Iterator[Event]:
        yield self._here(f"{self.part}.done") | {"content_index": 0, "text": self.text, **self._scores()}
        yield self._here("content_part.done") | {"content_index": 0, "part": self._part()}
        yield from super().end(status)

    def _delta(self, text: str, entries: Entries) -> Event:
        return self._here(f"{self.part}.delta") | {"content_index": 0, "delta": text}

    def _part(self) -> dict[str, Any]:
        return {"type": self.part, "text": self.text, **self._scores()}

    def _scores(self) -> dict[str, Any]:
        return {}


class Thought(Parted):
    prefix, part = "rs", "reasoning_text"
    rest = {"type": "reasoning", "summary": []}  # noqa: RUF012


class Message(Parted):
    prefix, part = "msg", "output_text"
    rest = {"type": "message", "role": "assistant"}  # noqa: RUF012

    def __init__(self, key: str, place: int) -> None:
        super().__init__(key, place)
        self._entries: list[Any] = []

    def _delta(self, text: str, entries: Entries) -> Event:
        self._entries += entries
        return super()._delta(text, entries) | {"logprobs": list(entries)}

    def _part(self) -> dict[str, Any]:
        return super()._part() | {"annotations": []}

    def _scores(self) -> dict[str, Any]:
        return {"logprobs": list(self._entries)}


class FunctionCall(OutputItem):
    prefix = "fc"

    def __init__(self, key: str, place: int, name: str) -> None:
        super().__init__(key, place)
        self.name = name

    def whole(self, status: Status) -> dict[str, Any]:
        called = {"call_id": f"call_{self.key}", "name": self.name, "arguments": self.text}
        return {"id": self.id, "type": "function_call", "status": status, **called}

    def end(self, status: Status) -> Iterator[Event]:
        yield self._here("function_call_arguments.done") | {"name": self.name, "arguments": self.text}
        yield from super().end(status)

    def _delta(self, text: str, entries: Entries) -> Event:
        return self._here("function_call_arguments.delta") | {"delta": text}
