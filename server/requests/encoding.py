"""Turns prompts into tokens: in threads where they are long, and refused before where they cannot fit.

It depends on texts and the length of the context, not on bodies.
"""

from collections.abc import Sequence
from typing import Protocol

from model.errors import InvalidRequest, context_exceeded
from server.service import Service
from weights.tokenizer import TooManyTokens

MAX_TRUNCATED = 1_000_000  # tokens of a text of which only the last are kept
MAX_CHARACTERS = 1 << 20  # of a text that need not fit the context
CHARACTERS_PER_TOKEN = 8  # of the context, where that allows more
INLINE_CHARACTERS = 4096  # of one call; more are tokenised in a thread


def max_characters(context: int) -> int:
    """How long a text may be that is tokenised although it may not fit: encoding takes 200 bytes per character."""
    return max(MAX_CHARACTERS, CHARACTERS_PER_TOKEN * context)


class EncodeFunction(Protocol):
    """A tokenizer's method for prompts, or for rendered chats."""

    def __call__(self, text: str, *, most: int | None = None) -> list[int]: ...


async def encode_all(
    service: Service, encode: EncodeFunction, texts: Sequence[str], new_tokens: int | None, kept: int | None = None
) -> list[list[int]]:
    """The ids of each text, which must fit the context with `new_tokens` more; with `kept`, only that many of the last.

    Raises:
        InvalidRequest: a text is longer than the context.
        EngineBusy: too many long texts are waiting.
    """
    context = service.served_models.info.max_model_len
    if sum(map(len, texts)) <= INLINE_CHARACTERS:
        return _encoded(service, encode, texts, context, new_tokens, kept)
    return await service.encoding.run(_encoded, service, encode, texts, context, new_tokens, kept)


def _encoded(
    service: Service,
    encode: EncodeFunction,
    texts: Sequence[str],
    context: int,
    new_tokens: int | None,
    kept: int | None,
) -> list[list[int]]:
    most, characters = context if kept is None else MAX_TRUNCATED, max_characters(context)
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
    for ids in found:  # a template may write a special token without an embedding
        service.served_models.check_tokens({"prompt": ids})
    return found


def _too_long(count: int, about: str, new_tokens: int | None, context: int, kept: int | None) -> InvalidRequest:
    if kept is None:
        return context_exceeded(count, 1 if new_tokens is None else new_tokens, context, about)
    field = "truncate_prompt_tokens"
    reason = f"a prompt of {about}{count} tokens; at most {MAX_TRUNCATED} are read to keep the last of them"
    return InvalidRequest(f"{field}: {reason}", field, "context_length_exceeded")


async def bad_word_tokens(service: Service, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each of `words`, as it begins a text and as it follows a space.

    Raises:
        EngineBusy: too many long texts are waiting.
    """
    if sum(map(len, words)) <= INLINE_CHARACTERS // 2:
        return _bad_word_tokens(service, words)
    return await service.encoding.run(_bad_word_tokens, service, words)


def _bad_word_tokens(service: Service, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    texts = [f"{space}{word.lstrip()}" for word in words for space in ("", " ")]
    return tuple(dict.fromkeys(tuple(service.tokenizer.encode(text, framed=False)) for text in texts))
