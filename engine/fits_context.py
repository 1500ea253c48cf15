"""Whether a request can be served at all: by its own numbers, the model's context and the size of the cache.

It knows one request, no others.
"""

from engine.types import MOST_ROUTED_TOKENS, Request
from model.errors import InvalidRequest, context_exceeded


def require_fits_context(request: Request, context: int, cache: int) -> None:
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
    if length + new > context:
        raise context_exceeded(length, new, context)
    if request.return_routes and length + new > MOST_ROUTED_TOKENS:
        raise InvalidRequest(
            f"return_routed_experts is for at most {MOST_ROUTED_TOKENS} tokens, but you requested {length + new}"
            f" ({length} in the prompt, {new} as max_tokens)",
            "return_routed_experts",
        )
    if computed > cache:
        raise InvalidRequest(
            f"The key-value cache of this server computes at most {cache} tokens. However, you requested "
            f"{length + new} tokens ({length} in the prompt, {new} as max_tokens)",
            "max_tokens",
            "context_length_exceeded",
        )
