"""A conversation and its settings: what was said, to which model, with which count. It prints nothing."""

from dataclasses import dataclass, field
from typing import Any

from terminal.connection import Server
from terminal.counts import Count, request_fields
from terminal.models import Card, chosen


@dataclass(slots=True)
class Session:
    """`count` None leaves the count to the server."""

    server: Server
    model: str = ""
    count: Count | None = None
    system: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)  # temperature, max_tokens, seed; absent: the server's
    turns: list[dict[str, str]] = field(default_factory=list)
    over: bool = False
    _card: Card | None = None

    def card(self) -> Card:
        """The model's card, asked for once. Raises what Server raises, and BadOption for an unknown model."""
        if self._card is None:
            self._card = chosen(self.server.models(), self.model)
            self.model = self._card.id
        return self._card

    def switch(self, name: str) -> Card:
        """Talk to another model from now on; nothing changes if there is none of that name."""
        card = chosen(self.server.models(), name)
        self.model, self._card = card.id, card
        return card

    def body(self, question: str) -> dict[str, Any]:
        """What is sent for the next turn."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self._settled({"messages": [*system, *self.turns, {"role": "user", "content": question}]})

    def completion(self, prompt: str) -> dict[str, Any]:
        """What is sent for a text to continue, outside the conversation."""
        return self._settled({"prompt": prompt})

    def _settled(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {
            **({"model": self.model} if self.model else {}),
            **asked,
            "stream": True,
            "stream_options": {"include_usage": True},
            **request_fields(self.count),
            **self.sampling,
        }

    def keep(self, question: str, answer: str) -> None:
        """A turn is kept whole or not at all: templates refuse two questions in a row."""
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
