"""What the server needs from its neighbours, as protocols: the engine, the tokenizer and the chat template.

It names no implementation; tests put fakes here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from engine.types import EngineInfo, Request, StepReport, TimedEvent
from model.errors import MoedialError

EngineState = Literal["loading", "ready", "restarting", "failed", "stopped"]


class Engine(Protocol):
    """The engine as seen from the HTTP process. `info` is known once the model has been loaded for the first time.

    `restarts` counts processes after the first one, `silence` is the seconds since the one that serves said anything.
    """

    on_report: Callable[[StepReport], None] | None
    restarts: int

    @property
    def pid(self) -> int | None: ...

    @property
    def silence(self) -> float: ...

    @property
    def info(self) -> EngineInfo | None: ...

    @property
    def state(self) -> EngineState: ...

    async def start(self) -> None: ...

    async def ready(self, timeout: float) -> EngineInfo:
        """Raises EngineDown when the model is not loaded in time, or never will be."""

    async def stop(self, timeout: float) -> None: ...

    def submit(self, request: Request, sink: Callable[[Sequence[TimedEvent] | MoedialError], None]) -> None:
        """`sink` gets every event, what comes together in one call, the last with `finish`; or the error that ends the
        request. It must not raise."""

    def compile(self, id: str, grammar: str, sink: Callable[[Sequence[TimedEvent] | MoedialError], None]) -> None:
        """`sink` gets no events when the grammar can be used, or an error."""

    def abort(self, request_id: str) -> None:
        """The sink is not called again."""


class IncrementalDecoder(Protocol):
    """Turns ids into text one at a time, holding back bytes that are not yet a whole character."""

    def push(self, id: int) -> str: ...

    def flush(self) -> str: ...


class Tokenizer(Protocol):
    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def specials(self) -> Mapping[str, int]:
        """The special tokens, which a text does not show, and their ids."""

    @property
    def named(self) -> Mapping[str, str]:
        """The special tokens that have a part: bos_token, eos_token, pad_token, unk_token."""

    def least_tokens(self, text: str) -> int:
        """No fewer tokens than these come of a text; 0 where nothing is known."""

    def encode(self, text: str, framed: bool = True, most: int | None = None) -> list[int]:
        """`framed`: with what the checkpoint puts around a prompt. Raises TooManyTokens beyond `most`."""

    def encode_chat(self, text: str, framed: bool = False, most: int | None = None) -> list[int]: ...

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """`specials`: with the texts of special tokens."""

    def token_bytes(self, id: int) -> bytes: ...

    def stream(self, shown: Sequence[str] = (), continues: bool = False) -> IncrementalDecoder:
        """`shown`: special tokens whose text is wanted. `continues`: the text goes on from another."""


class ChatTemplate(Protocol):
    knows_tools: bool  # whether it writes them at all
    knows_thinking: bool  # whether enable_thinking says anything to it
    source: str

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str: ...
