"""The prompts of a run: lines of a file or built-in text, whole or cut to a number of tokens. It measures nothing."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from terminal.bench.plan import PlannedRequest
from terminal.bench.texts import TEXTS
from terminal.connection import Server
from terminal.errors import BadOption, Refused

Prompt = str | list[int]
RUN_TOKENS = 12  # fewer than a block of a prefix cache, enough to be language


def texts_of(path: Path | None) -> Sequence[str]:
    """The non-empty lines of a file, or the built-in texts. Raises BadOption where there are none."""
    if path is None:
        return TEXTS
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadOption(f"--prompts {path}: {error}") from None
    if not (found := [line for line in lines if line]):
        raise BadOption(f"--prompts {path} has no line with text")
    return found


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Makes prompts. `ids` are the tokens of the whole text, empty where prompts are not cut."""

    texts: Sequence[str]
    ids: list[int]
    server: Server
    model: str
    chat: bool

    @classmethod
    def prepare(cls, server: Server, model: str, path: Path | None, cut: bool, chat: bool) -> "PromptSource":
        """Read the texts, and tokenise them at the server where prompts are cut."""
        texts = texts_of(path)
        return cls(texts, _ids(server, model, "\n\n".join(texts)) if cut else [], server, model, chat)

    def of(self, request: PlannedRequest) -> Prompt:
        """The prompt of one request: the texts in order, or `length` tokens from random positions of the text.

        Short runs of tokens are joined, since prompts with equal beginnings would hit the server's prefix cache. A chat
        cannot be sent as ids, so that there the tokens become text again; with the template around it, the server
        counts other numbers of tokens, which are in the report.
        """
        if request.length is None:
            return self.texts[request.number % len(self.texts)]
        positions, ids = random.Random(request.text_seed), list[int]()
        while len(ids) < request.length:
            start = positions.randrange(len(self.ids))
            ids += self.ids[start : start + RUN_TOKENS]
        ids = ids[: request.length]
        return self._text(ids) if self.chat else ids

    def _text(self, ids: list[int]) -> str:
        return str(_field_of(self.server, "/detokenize", {"model": self.model, "tokens": ids}, "prompt"))


def _ids(server: Server, model: str, text: str) -> list[int]:
    ids = _field_of(server, "/tokenize", {"model": model, "prompt": text}, "tokens")
    if not isinstance(ids, list) or not ids:
        raise Refused("/tokenize gave no tokens", "no tokens")
    return ids


def _field_of(server: Server, path: str, body: dict[str, object], field: str) -> object:
    """One field of the answer to a POST."""
    try:
        return server.post(path, body)[field]
    except (KeyError, TypeError, IndexError):
        raise Refused(f"{path} did not answer with {field}", f"no {field}") from None
    except Refused as error:
        reason = f"--prompt-tokens needs {path}: {error}; leave it out to send prompts as they are"
        raise Refused(reason, error.kind) from None
