"""Whether a request can be served at all: by its own numbers, the model's context and the size of the cache.

It knows one request, no others.
"""

from engine.types import Request
from model.errors import InvalidRequest


def refuse_misfit(request: Request, context: int, cache: int) -> None:
    """`context` and `cache` are in tokens.

    Raises:
        InvalidRequest: it is empty, or could never fit.
    """
    length, new = len(request.prompt), request.sampling.max_tokens
    if length < 1:
        raise InvalidRequest("the prompt must have at least one token", "prompt")
    if new < 1 and (new < 0 or request.sampling.prompt_logprobs is None):
        raise InvalidRequest(f"max_tokens must be at least 1, got {new}", "max_tokens")
    computed = length + max(new, 1) - 1  # the last new token is returned, never computed
    for wanted, limit, owner in (
        (length + new, context, "the context of this model has room for"),
        (computed, cache, "the key-value cache of this server can compute"),
    ):
        if wanted > limit:
            raise InvalidRequest(
                f"the prompt has {length} tokens and max_tokens is {new}, together {length + new}; {owner} {limit}",
                "max_tokens",
                "context_length_exceeded",
            )
