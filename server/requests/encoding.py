"""Prompts to tokens: beside the event loop where they are long, and refused before that where they cannot fit.

It knows texts and the context's length, no bodies.
"""

from collections.abc import Sequence
from typing import Protocol

from model.errors import InvalidRequest, context_exceeded
from server.service import Service
from weights.tokenizer import TooManyTokens

MOST_CUT = 1_000_000  # tokens of a text of which the last are kept
MOST_TEXT, TEXT_PER_TOKEN = (
    1 << 20,
    8,
)  # characters of a text that need not fit: so many, or so many per token of room
INLINE = 4096  # characters of one call that are tokenised on the event loop


def most_characters(context: int) -> int:
    """How long a text may be that is tokenised though it may not fit: encoding takes 200 bytes per character."""
    return max(MOST_TEXT, TEXT_PER_TOKEN * context)


class Encode(Protocol):
    """A tokenizer's way of encoding: prompts, or rendered chats."""

    def __call__(self, text: str, *, most: int | None = None) -> list[int]: ...


async def encode_all(
    service: Service, encode: Encode, texts: Sequence[str], new_tokens: int | None, kept: int | None = None
) -> list[list[int]]:
    """The ids of each text, of which `new_tokens` more have to fit the context; with `kept` only so many of the last.

    Raises:
        InvalidRequest: a text is longer than the context.
        EngineBusy: too many long texts are waiting.
    """
    context = service.served_models.info.max_model_len
    if sum(map(len, texts)) <= INLINE:
        return _encoded(service, encode, texts, context, new_tokens, kept)
    return await service.encoding.run(_encoded, service, encode, texts, context, new_tokens, kept)


def _encoded(
    service: Service, encode: Encode, texts: Sequence[str], context: int, new_tokens: int | None, kept: int | None
) -> list[list[int]]:
    most, characters = context if kept is None else MOST_CUT, most_characters(context)
    for text in texts:
        if (least := service.tokenizer.least_tokens(text)) > most:
            raise _too_long(least, "at least ", new_tokens, context, kept)
    for text in texts:
        if kept is not None and len(text) > characters:
            reason = f"a prompt of {len(text)} characters; at most {characters} are read to keep its last tokens"
            raise InvalidRequest(f"truncate_prompt_tokens: {reason}", "truncate_prompt_tokens")
    try:
        found = [encode(text, most=most)[-(kept or most) :] for text in texts]
    except TooManyTokens as error:
        about = "" if error.exact else "at least "
        raise _too_long(error.count, about, new_tokens, context, kept) from None
    for ids in found:  # a template may write a special token that the model has no embedding for
        service.served_models.check_tokens({"prompt": ids})
    return found


def _too_long(count: int, about: str, new_tokens: int | None, context: int, kept: int | None) -> InvalidRequest:
    if kept is None:
        return context_exceeded(count, 1 if new_tokens is None else new_tokens, context, about)
    field = "truncate_prompt_tokens"
    reason = f"a prompt of {about}{count} tokens; at most {MOST_CUT} are read to keep the last of them"
    return InvalidRequest(f"{field}: {reason}", field, "context_length_exceeded")


async def bad_word_tokens(service: Service, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each of `words`, as it begins a text and as it follows a space.

    Raises:
        EngineBusy: too many long texts are waiting.
    """
    if sum(map(len, words)) <= INLINE // 2:
        return _to_avoid(service, words)
    return await service.encoding.run(_to_avoid, service, words)


def _to_avoid(service: Service, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    texts = [f"{space}{word.lstrip()}" for word in words for space in ("", " ")]
    return tuple(dict.fromkeys(tuple(service.tokenizer.encode(text, framed=False)) for text in texts))
