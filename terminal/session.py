"""The state of a conversation: messages, model, expert count, sampling. It prints nothing."""

from dataclasses import dataclass, field
from typing import Any

from terminal.connection import Server
from terminal.counts import Count, request_fields
from terminal.models import ModelCard, chosen


@dataclass(slots=True)
class ChatSession:
    """`count` None leaves the count to the server."""

    server: Server
    model: str = ""
    count: Count | None = None
    system: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)  # temperature, max_tokens, seed; absent: the server's
    messages: list[dict[str, str]] = field(default_factory=list)
    ended: bool = False
    _card: ModelCard | None = None

    def card(self) -> ModelCard:
        """The model's card, requested once. Raises what Server raises, and BadOption for an unknown model."""
        if self._card is None:
            self._card = chosen(self.server.models(), self.model)
            self.model = self._card.id
        return self._card

    def switch(self, name: str) -> ModelCard:
        """Use another model from now on. Raises BadOption, and changes nothing, if there is none of that name."""
        card = chosen(self.server.models(), name)
        self.model, self._card = card.id, card
        return card

    def body(self, question: str) -> dict[str, Any]:
        """The body of a chat request with the next question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self._with_settings({"messages": [*system, *self.messages, {"role": "user", "content": question}]})

    def completion(self, prompt: str) -> dict[str, Any]:
        """The body of a completion request, outside the conversation."""
        return self._with_settings({"prompt": prompt})

    def _with_settings(self, request: dict[str, Any]) -> dict[str, Any]:
        model = {"model": self.model} if self.model else {}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {**model, **request, **stream, **request_fields(self.count), **self.sampling}

    def keep(self, question: str, answer: str) -> None:
        """Add a question and its answer, always both: chat templates refuse two questions in a row."""
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
