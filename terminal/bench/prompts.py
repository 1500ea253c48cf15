"""Prompts of a run: lines of a file or our own text, as they are or cut to a number of tokens. It measures nothing."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from terminal.bench.plan import Job
from terminal.bench.texts import TEXTS
from terminal.connection import Server
from terminal.errors import BadOption, Refused

Prompt = str | list[int]
STRETCH = 12  # tokens: fewer than a block of a prefix cache, enough to be language


def texts_of(path: Path | None) -> Sequence[str]:
    """Lines that say something. Raises BadOption where there are none."""
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
class Prompts:
    """`ids` is the whole text as the model's tokens, empty where prompts are not cut."""

    texts: Sequence[str]
    ids: list[int]
    server: Server
    model: str
    chat: bool

    @classmethod
    def prepare(cls, server: Server, model: str, path: Path | None, cut: bool, chat: bool) -> "Prompts":
        texts = texts_of(path)
        return cls(texts, _ids(server, model, "\n\n".join(texts)) if cut else [], server, model, chat)

    def of(self, job: Job) -> Prompt:
        """Texts in their order, again from the first when they run out; or `length` tokens, a stretch from here and one
        from there: prompts that begin alike would meet the server's prefix cache.

        A conversation has no ids on the wire, so there the tokens go back into text; with the template around them, and
        as they are tokenised again, the server counts other numbers. What it counted is in the report.
        """
        if job.length is None:
            return self.texts[job.number % len(self.texts)]
        draws, ids = random.Random(job.places), list[int]()
        while len(ids) < job.length:
            start = draws.randrange(len(self.ids))
            ids += self.ids[start : start + STRETCH]
        ids = ids[: job.length]
        return self._text(ids) if self.chat else ids

    def _text(self, ids: list[int]) -> str:
        return str(_asked(self.server, "/detokenize", {"model": self.model, "tokens": ids}, "prompt"))


def _ids(server: Server, model: str, text: str) -> list[int]:
    ids = _asked(server, "/tokenize", {"model": model, "prompt": text}, "tokens")
    if not isinstance(ids, list) or not ids:
        raise Refused("/tokenize gave no tokens", "no tokens")
    return ids


def _asked(server: Server, path: str, body: dict[str, object], field: str) -> object:
    try:
        return server.post(path, body)[field]
    except (KeyError, TypeError, IndexError):
        raise Refused(f"{path} did not answer with {field}", f"no {field}") from None
    except Refused as error:
        raise Refused(
            f"--prompt-tokens needs {path}: {error}; leave it out to send prompts as they are", error.kind
        ) from None
