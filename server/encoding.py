"""Prompts to tokens: beside the event loop where they are long, and refused before that where they cannot fit.

It knows texts and the context's length, no bodies.
"""

from collections.abc import Sequence
from typing import Protocol

from model.errors import context_exceeded
from server.service import Service
from weights.tokenizer import TooManyTokens

INLINE = 4096  # characters of one call that are tokenised on the event loop


class Encode(Protocol):
    """A tokenizer's way of encoding: prompts, or rendered chats."""

    def __call__(self, text: str, *, most: int | None = None) -> list[int]: ...


async def encode_all(service: Service, encode: Encode, texts: Sequence[str], new_tokens: int | None) -> list[list[int]]:
    """The ids of each text, of which `new_tokens` more have to fit the context.

    Raises:
        InvalidRequest: a text is longer than the context.
        EngineBusy: too many long texts are waiting.
    """
    context = service.catalogue.info.max_model_len
    if sum(map(len, texts)) <= INLINE:
        return _encoded(service, encode, texts, context, new_tokens)
    return await service.encoding.run(_encoded, service, encode, texts, context, new_tokens)


def _encoded(
    service: Service, encode: Encode, texts: Sequence[str], context: int, new_tokens: int | None
) -> list[list[int]]:
    for text in texts:
        if (least := service.tokenizer.least_tokens(text)) > context:
            raise context_exceeded(least, 1 if new_tokens is None else new_tokens, context, "at least ")
    try:
        found = [encode(text, most=context) for text in texts]
    except TooManyTokens as error:
        about = "" if error.exact else "at least "
        raise context_exceeded(error.count, 1 if new_tokens is None else new_tokens, context, about) from None
    for ids in found:  # a template may write a special token that the model has no embedding for
        service.catalogue.check_tokens({"prompt": ids})
    return found
