"""The items of a response's output while they are written: the events on the way, and the item at any moment.

Not here: the numbers of events (see `server/formats/responses.py`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

Event = dict[str, Any]
ItemStatus = Literal["in_progress", "completed", "incomplete"]
LogprobEntries = Sequence[Any]  # as they are written


class OutputItem:
    """One item. `key` makes its ids different from those of other answers."""

    prefix: str

    def __init__(self, key: str, output_index: int) -> None:
        self.key, self.output_index = f"{key}{output_index:03x}", output_index
        self.id = f"{self.prefix}_{self.key}"
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def snapshot(self, status: ItemStatus) -> dict[str, Any]:
        """The item as it is now."""
        raise NotImplementedError

    def begin(self) -> Iterator[Event]:
        """The events that begin the item."""
        yield {
            "type": "response.output_item.added",
            "output_index": self.output_index,
            "item": self.snapshot("in_progress"),
        }

    def add(self, text: str, entries: LogprobEntries) -> Event:
        """Add text; returns its event."""
        self._texts.append(text)
        return self._delta(text, entries)

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """The events that end the item."""
        yield {"type": "response.output_item.done", "output_index": self.output_index, "item": self.snapshot(status)}

    def _delta(self, text: str, entries: LogprobEntries) -> Event:
        raise NotImplementedError

    def _event(self, kind: str) -> Event:
        return {"type": f"response.{kind}", "item_id": self.id, "output_index": self.output_index}


class TextItem(OutputItem):
    """An item with one content part, which is text."""

    part: str
    fixed_fields: dict[str, Any]  # of the item, beside id, status and content

    def snapshot(self, status: ItemStatus) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part()]
        return {"id": self.id, **self.fixed_fields, "status": status, "content": content}

    def begin(self) -> Iterator[Event]:
        yield from super().begin()
        yield self._event("content_part.added") | {"content_index": 0, "part": self._part()}

    def end(self, status: ItemStatus) -> Iterator[Event]:
        yield self._event(f"{self.part}.done") | {"content_index": 0, "text": self.text, **self._logprobs()}
        yield self._event("content_part.done") | {"content_index": 0, "part": self._part()}
        yield from super().end(status)

    def _delta(self, text: str, entries: LogprobEntries) -> Event:
        return self._event(f"{self.part}.delta") | {"content_index": 0, "delta": text}

    def _part(self) -> dict[str, Any]:
        return {"type": self.part, "text": self.text, **self._logprobs()}

    def _logprobs(self) -> dict[str, Any]:
        return {}


class ReasoningItem(TextItem):
    prefix, part = "rs", "reasoning_text"
    fixed_fields = {"type": "reasoning", "summary": []}  # noqa: RUF012


class MessageItem(TextItem):
    prefix, part = "msg", "output_text"
    fixed_fields = {"type": "message", "role": "assistant"}  # noqa: RUF012

    def __init__(self, key: str, output_index: int) -> None:
        super().__init__(key, output_index)
        self._entries: list[Any] = []

    def _delta(self, text: str, entries: LogprobEntries) -> Event:
        self._entries += entries
        return super()._delta(text, entries) | {"logprobs": list(entries)}

    def _part(self) -> dict[str, Any]:
        return super()._part() | {"annotations": []}

    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": list(self._entries)}


class FunctionCallItem(OutputItem):
    prefix = "fc"

    def __init__(self, key: str, output_index: int, name: str) -> None:
        super().__init__(key, output_index)
        self.name = name

    def snapshot(self, status: ItemStatus) -> dict[str, Any]:
        called = {"call_id": f"call_{self.key}", "name": self.name, "arguments": self.text}
        return {"id": self.id, "type": "function_call", "status": status, **called}

    def end(self, status: ItemStatus) -> Iterator[Event]:
        yield self._event("function_call_arguments.done") | {"name": self.name, "arguments": self.text}
        yield from super().end(status)

    def _delta(self, text: str, entries: LogprobEntries) -> Event:
        return self._event("function_call_arguments.delta") | {"delta": text}
