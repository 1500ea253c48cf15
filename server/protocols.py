"""What the server needs of its neighbours: protocols of the engine client, the tokenizer and the chat template.

It names no implementation; tests use fakes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from engine.types import EngineInfo, Request, StepReport, TimedEvent
from model.budget import ExpertBudget, ExpertCounts
from model.errors import MoedialError
from server.cascade import Cascade

EngineState = Literal["loading", "ready", "restarting", "failed", "stopped"]


class EngineProtocol(Protocol):
    """The engine as the HTTP process sees it. `info` is known once the model has been loaded for the first time.

    `restarts` counts engine processes after the first; `silence` is the time in seconds since the current one last sent
    anything.
    """

    on_report: Callable[[StepReport], None] | None

    @property
    def restarts(self) -> int: ...

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
        """Start a request. `sink` is called with its events, those that arrive together in one call, the last with
        `finish`; or with the error that ends the request. It must not raise."""

    def compile(self, id: str, grammar: str, sink: Callable[[Sequence[TimedEvent] | MoedialError], None]) -> None:
        """Compile a grammar. `sink` is called with no events when it can be used, or with an error."""

    def abort(self, request_id: str) -> None:
        """Stop a request; its sink is not called again."""

    def set_counts(self, request_id: str, counts: ExpertCounts) -> None:
        """Let the tokens of a running request that are still to be computed have these counts."""


class ExpertChoiceProtocol(Protocol):
    """What the sequences of one call may use, as a generation call asks for it."""

    @property
    def interval(self) -> float | None:
        """Seconds between two calls of `again` while the sequences run; None: none are wanted."""

    @property
    def cascade(self) -> Cascade | None:
        """What decides whether an answer is made again; None: each is made once."""

    def begin(self) -> ExpertBudget:
        """The budget of a sequence that starts now, the same for all of the call."""

    def again(self) -> ExpertBudget | None:
        """The budget for the tokens from here on, if it is another one now."""


class DetokenizerProtocol(Protocol):
    """An incremental detokeniser: turns ids into text one at a time.

    It holds back bytes that are not a whole character yet.
    """

    def push(self, id: int) -> str: ...

    def flush(self) -> str: ...


class TokenizerProtocol(Protocol):
    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @property
    def specials(self) -> Mapping[str, int]:
        """The special tokens, which a text does not show, and their ids."""

    @property
    def named(self) -> Mapping[str, str]:
        """The special tokens that have a role: bos_token, eos_token, pad_token, unk_token."""

    def least_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of `text`; 0 where none is known."""

    def encode(self, text: str, framed: bool = True, most: int | None = None) -> list[int]:
        """Token ids. `framed`: with the tokens that the checkpoint puts around a prompt. Raises TooManyTokens beyond
        `most`."""

    def encode_chat(self, text: str, framed: bool = False, most: int | None = None) -> list[int]: ...

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """The text of token ids; with `specials`, the texts of special tokens too."""

    def token_bytes(self, id: int) -> bytes: ...

    def stream(self, shown: Sequence[str] = (), continues: bool = False) -> DetokenizerProtocol:
        """A detokeniser. `shown`: special tokens whose text is wanted. `continues`: the text follows another one."""


class ChatTemplateProtocol(Protocol):
    knows_tools: bool  # whether it uses tools
    knows_thinking: bool  # whether it uses enable_thinking
    source: str

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str: ...
